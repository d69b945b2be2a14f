"""What the four scripts write in one run at the smallest size (conftest.py), and every system's answer to a recording."""
import json
import sys

import pytest
import torch
from conftest import stage
from kill import finish, start

import common


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
    assert all(counts["sampled"] % 40 == 0 for counts in funnel.values())
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


def test_the_evaluation(work, tmp_path):
    results = json.loads((work / "results.json").read_text())
    rows = {(r["condition"], r["system"], r["task"], r["metric"]): r for r in results["rows"]}
    assert {s for _, s, _, _ in rows} == {"text", "sft", "rba", "rba+opd"}
    assert rows["clean", "text", "sqa", "accuracy"]["value"] >= 50    # the teacher says again what it said
    assert all(r["low"] <= r["value"] + 1e-9 and r["value"] <= r["high"] + 1e-9 for r in rows.values())
    unheard = [i for i in common.read_items(work, "test_all") if i["voice"] in common.PRESETS["tiny"]["unheard_voices"]]
    assert sum(r["n"] for (c, s, _, m), r in rows.items() if (c, s, m) == ("clean, unheard voices", "rba", "tokens")) == len(unheard) > 0
    text = (work / "results.md").read_text()
    assert "†" in text and "excludes 0" in text and text.strip().splitlines()[-1] in (work / "stdout.txt").read_text()
    assert (work / "results.png").stat().st_size > 5000
    (tmp_path / "again.json").write_text((work / "results.json").read_text())
    stage("04_evaluate").draw(tmp_path / "again.json")       # --draw
    assert (tmp_path / "again.md").read_text() == text and (tmp_path / "again.png").stat().st_size > 5000
    answers = common.read_jsonl(work / "answers" / "test_all" / "rba.babble-5.jsonl")
    assert [a["id"] for a in answers] == [i["id"] for i in common.read_items(work, "test_all")]


def test_ask_prints_every_systems_answer(work, tmp_path, model, monkeypatch, capsys):
    question = work / "data" / common.read_items(work, "test_all")[0]["audio"]
    out, _ = finish(start("04_evaluate.py", work, ["--ask", question]))
    assert all(f"{name} |" in out for name in ("cascade", "sft", "kd", "sft+", "rba", "rba+opd"))
    monkeypatch.setattr(common, "load_speechlm", lambda *_: model)
    nothing = ["04_evaluate.py", "--work", str(tmp_path / "nothing"), "--ask", str(question)]
    for flags, systems in (([], ["cascade", "sft", "kd", "rba"]), (["--systems", "cascade,init"], ["cascade", "init"])):
        monkeypatch.setattr(sys, "argv", nothing + flags)
        stage("04_evaluate").main()
        answers = dict(line.strip().split(" | ", 1) for line in capsys.readouterr().out.splitlines() if " | " in line)
        assert [*answers] == systems                         # right after the installation: the shipped ones
        assert all(len(answer) > 5 for answer in answers.values())
    assert answers["init"] == answers["cascade"]             # untrained, it reads what the cascade reads
    assert not (tmp_path / "nothing").exists()
