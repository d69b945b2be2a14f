"""The four scripts by subprocess at the smallest size, their resume, and the one-line errors."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, stage

import common

SIZES = ["--n-train", "12", "--n-valid", "3", "--n-test", "6"]


def script(name, *flags, expect=0, **options):
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One end-to-end run of the four scripts."""
    folder = tmp_path_factory.mktemp("run") / "work"
    script("01_synthesize.py", "--work", folder, *SIZES)
    script("02_sft_warmup.py", "--work", folder, "--max-steps", 2, "--batch-size", 4)
    script("03_rba_rl.py", "--work", folder, "--max-steps", 2, "--batch-size", 2, "--k", 2, "--out", "rba")
    script("03_rba_rl.py", "--work", folder, "--max-steps", 1, "--batch-size", 2, "--k", 2, "--baseline", "greedy",
           "--token-reward", 0.1, "--rewards", "semantic=1,logp=0.5")
    folder.joinpath("stdout.txt").write_text(script("04_evaluate.py", "--work", folder).stdout)
    return folder


def test_the_data_set(work):
    splits = {split: common.read_items(work, split) for split in (*common.SPLITS, "test_all")}
    assert len(splits["test_all"]) == 6 and len(splits["train"]) >= 6 
    texts = [" ".join(item["text"].lower().split()) for split in common.SPLITS for item in splits[split]]
    assert len(set(texts)) == len(texts)                  # no instruction stands in two splits
    for split, items in splits.items():
        for item in items:
            wave = common.read_audio(work / "data" / item["audio"])
            assert len(wave) / common.RATE == pytest.approx(item["seconds"], abs=1e-3)
            assert item["split"] == split.split("_")[0] and item["ended"]
            if split in ("train", "valid", "test"):
                assert item["wer"] <= 0.1
            if item["task"] == "sqa":
                assert item["reference"][0].lower() in item["response"].lower()
    funnel = json.loads((work / "data" / "funnel.json").read_text())
    assert all(counts["sampled"] % 128 == 0 for counts in funnel.values())
    card = (work / "data" / "card.md").read_text()
    assert "piper-joe" in card and "## Ten rows" in card


def test_checkpoints_logs_and_plots(work):
    for name in ("sft", "kd", "sft+", "rba", "rba+opd"):
        held = torch.load(work / f"{name}.pt", weights_only=True)
        assert held["format"] == "rba-speechlm-1" and held["history"][-1]["seed"] == 0 and held["data"]
        assert json.loads((work / f"{name}.config.json").read_text())["versions"]["torch"].startswith("2.11")
        assert len(common.read_jsonl(work / "logs" / f"{name}.jsonl")) == (1 if name == "rba+opd" else 2)
    sft, rba = (torch.load(work / f"{name}.pt", weights_only=True)["state"] for name in ("sft", "rba"))
    for part in ("bridge.weight", "lora_A", "lora_B"):       # RL trains the bridge and both LoRA factors
        assert any(part in n and not torch.equal(sft[n], rba[n]) for n in sft), part
    gap = json.loads((work / "gap.json").read_text())
    assert gap["train"]["nll_text"] < gap["train"]["nll_speech"]
    rows = common.read_jsonl(work / "logs" / "rba.jsonl")
    assert all(abs(row["loss"]) < 5 and row["tokens"] > 0 and row["sample"]["answer"] for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-3) and rows[0]["semantic"]["teacher"] == pytest.approx(1, abs=1e-3)
    assert (work / "plots" / "rba.png").stat().st_size > 5000 and (work / "plots" / "rba+opd.png").exists()


def test_the_evaluation(work):
    results = json.loads((work / "results.json").read_text())
    rows = {(r["condition"], r["system"], r["task"], r["metric"]): r for r in results["rows"]}
    assert {s for _, s, _, _ in rows} == {"text", "cascade", "sft", "kd", "sft+", "rba", "rba+opd"}
    assert rows["clean", "text", "sqa", "accuracy"]["value"] >= 50    # the teacher says again what it said
    assert all(r["low"] <= r["value"] + 1e-9 and r["value"] <= r["high"] + 1e-9 for r in rows.values())
    unheard = [i for i in common.read_items(work, "test_all") if i["voice"] in common.PRESETS["tiny"]["unheard_voices"]]
    assert sum(r["n"] for (c, s, _, m), r in rows.items() if (c, s, m) == ("clean, unheard voices", "rba", "tokens")) == len(unheard) > 0
    text = (work / "results.md").read_text()
    assert "†" in text and "separable" in text and text.strip().splitlines()[-1] in (work / "stdout.txt").read_text()
    assert (work / "results.png").stat().st_size > 5000
    answers = common.read_jsonl(work / "answers" / "test_all" / "rba.babble-5.jsonl")
    assert [a["id"] for a in answers] == [i["id"] for i in common.read_items(work, "test_all")]


def test_running_again_changes_nothing(work):
    def state():
        return {p: p.read_bytes() for pattern in ("*.pt", "*.json", "*.md", "data/*.jsonl", "answers/*/*.jsonl") for p in work.glob(pattern)}
    before = state()
    (work / "data" / "batches" / "speech-0000.jsonl").unlink()   # as after a kill in this batch
    (work / "answers" / "test_all" / "sft.clean.jsonl").unlink()
    script("01_synthesize.py", "--work", work, *SIZES)
    script("04_evaluate.py", "--work", work)
    after = state()
    assert [p.name for p in before if before[p] != after.get(p)] == []


@pytest.fixture(scope="module")
def flags(work):
    """An undisturbed run in one process, `whole`, and the flags that made it."""
    flags = ["--work", work, "--objective", "sft", "--max-steps", 6, "--batch-size", 4]
    script("02_sft_warmup.py", *flags, "--out", "whole")
    return flags


def test_a_killed_training_goes_on_step_by_step(work, flags):
    log = work / "logs" / "cut.jsonl"
    process = subprocess.Popen([sys.executable, str(ROOT / "02_sft_warmup.py"), *map(str, flags), "--out", "cut"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "cut.pt").exists()
    script("02_sft_warmup.py", *flags, "--out", "cut")
    losses = [[(row["step"], pytest.approx(row["loss"], rel=1e-4)) for row in common.read_jsonl(work / "logs" / f"{n}.jsonl")]
              for n in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_ask_prints_every_systems_answer(work, tmp_path):
    item = common.read_items(work, "test_all")[0]
    out = script("04_evaluate.py", "--work", work, "--ask", work / "data" / item["audio"]).stdout
    assert all(f"{name} |" in out for name in ("cascade", "sft", "kd", "rba"))
    out = script("04_evaluate.py", "--work", tmp_path / "nothing", "--ask", work / "data" / item["audio"]).stdout
    answers = [line.partition("|")[2] for line in out.splitlines() if " | " in line]
    assert "cascade |" in out and "init |" in out and len(answers) == 2                    # right after the installation
    assert answers[0] == answers[1] and len(answers[0]) > 5    # untrained, it reads what the cascade reads


def test_two_processes_train_like_one(work, flags):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(ROOT / "02_sft_warmup.py"), *map(str, flags), "--out", "two"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (common.read_jsonl(work / "logs" / f"{name}.jsonl") for name in ("whole", "two"))
    assert len(one) == len(two) == 6
    for name, close in (("loss", 2e-3), ("grad_norm", 1e-2)):   # same weights, same batch: bfloat16's order of sums apart
        assert two[0][name] == pytest.approx(one[0][name], rel=close)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0.03)   # then roundings add up


# ----------------------------------------------------------------------------------------------------- one-line errors
@pytest.mark.parametrize("name, flags, words", [
    ("01_synthesize.py", ["--preset", "huge"], "no such preset"), ("01_synthesize.py", ["--frobnicate"], "--frobnicate"),
    ("01_synthesize.py", ["--n-train", "many"], "--n-train"), ("01_synthesize.py", ["--n-train", "1"], "--n-train"),
    ("02_sft_warmup.py", [], "train.jsonl: missing; run 01_synthesize.py"), ("02_sft_warmup.py", ["--objective", "dpo"], "dpo"),
    ("02_sft_warmup.py", ["--lr", "-1"], "--lr"), ("03_rba_rl.py", [], "train.jsonl: missing"),
    ("03_rba_rl.py", ["--rewards", "beauty=1"], "beauty"), ("03_rba_rl.py", ["--k", "1"], "loo"),
    ("03_rba_rl.py", ["--baseline", "mean"], "mean"), ("03_rba_rl.py", ["--rewards", "none"], "no reward"),
    ("04_evaluate.py", [], "no checkpoint"), ("04_evaluate.py", ["--systems", "rba"], "rba")])
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, name, flags, words):
    monkeypatch.setattr(sys, "argv", [name, "--work", str(tmp_path / "empty"), *flags])
    with pytest.raises(SystemExit) as stop:
        common.run(stage(name.removesuffix(".py")).main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_broken_lines_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    good = {field: "" for field in common.ITEM_FIELDS}
    for lines, words in ((['{"id": "a"'], "train.jsonl:1"), ([json.dumps(good | {"id": "a"}), "cut"], "train.jsonl:2"),
                         ([json.dumps({"id": "a"})], "lacks the field task"),
                         ([json.dumps(good | {"id": "a"})] * 2, "stands already in line 1")):
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(common.UserError, match=words):
            common.read_items(tmp_path, "train")


def test_another_configuration_is_refused_by_name(tmp_path):
    common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 4})
    common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 4})
    with pytest.raises(common.UserError, match="k: 4 -> 8"):
        common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 8})


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    common.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")
    with pytest.raises(common.UserError, match="No space left"):
        common.write_atomic(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
