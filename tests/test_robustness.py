"""Kills, several processes, full disks and what users get wrong, on real stages at the smallest size."""
import functools
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import Killed, die, log_of, run_here, run_stage, stage

import common

SFT = ("--objective", "sft", "--max-steps", 4, "--batch-size", 2)
GROUP = ("--objective", "rba-group", "--init", "none", "--rounds", 2, "--max-steps", 2, "--batch-size", 2)


@pytest.fixture
def copy(groups, tmp_path):
    def new(name="work", source=groups):
        shutil.copytree(source, tmp_path / name)
        return tmp_path / name
    return new


def same_state(a, b, name):
    a, b = (torch.load(work / f"{name}.pt", weights_only=True)["state"] for work in (a, b))
    return all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------- kills and processes
@pytest.mark.slow
def test_02_killed_in_its_writes_repeats_every_loss(copy):
    whole, killed = copy("whole"), copy("killed")
    shutil.rmtree(killed / "heard")
    run_stage("02_sft_warmup.py", whole, *SFT)
    for at in (2, 7, 8):                                  # what Whisper heard, a log line, a resume file
        die("02_sft_warmup.py", killed, at, *SFT)
    run_stage("02_sft_warmup.py", killed, *SFT)
    assert log_of(whole, "sft") == log_of(killed, "sft") and same_state(whole, killed, "sft")
    assert not list(killed.rglob("*.resume.pt"))
    assert "done already" in run_stage("02_sft_warmup.py", killed, *SFT)


@pytest.fixture(params=["in this process", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def run_and_die(request, model):
    """How a stage is run and killed: (run(script, work, flags...), die(script, work, at, flags...))."""
    def die_here(script, work, at, *flags):
        with pytest.raises(Killed):
            run_here(model, script, work, *flags, die_at=at)
    return (run_stage, die) if request.param == "SIGKILL" else (functools.partial(run_here, model), die_here)


def test_03_killed_in_its_writes_repeats_samples_and_losses(copy, run_and_die):
    """Two rounds; killed in a sample and in the second round's log."""
    whole, killed, (run, killed_run) = copy("whole"), copy("killed"), run_and_die
    run("03_rba_rl.py", whole, *GROUP)
    for at in (7, 11):
        killed_run("03_rba_rl.py", killed, at, *GROUP)
    run("03_rba_rl.py", killed, *GROUP)
    assert log_of(whole, "rba-group") == log_of(killed, "rba-group")
    assert same_state(whole, killed, "rba-group")
    samples = [(work / "samples" / "rba-group.jsonl").read_text() for work in (whole, killed)]
    assert samples[0] == samples[1]
    assert {json.loads(line)["round"] for line in samples[0].splitlines()} == {0, 1}


@pytest.mark.slow
def test_01_killed_goes_on_with_two_processes(work, tmp_path):
    from conftest import SIZES
    for at in (2, 12):
        die("01_synthesize.py", tmp_path / "work", at, *SIZES)
    run_stage("01_synthesize.py", tmp_path / "work", *SIZES, processes=2)
    for split in common.SPLITS:
        mine, whole = (folder / "data" / f"{split}.jsonl" for folder in (tmp_path / "work", work))
        assert mine.read_bytes() == whole.read_bytes()
    for wav in (work / "data/audio").iterdir():
        assert wav.read_bytes() == (tmp_path / "work/data/audio" / wav.name).read_bytes()


@pytest.mark.slow
def test_04_killed_goes_on(work, copy):
    other = copy(source=work)
    shutil.rmtree(other / "answers")
    (other / "results.json").unlink()
    flags = ("--systems", "text,base,sft,rba-single")
    die("04_evaluate.py", other, 3, *flags)
    run_stage("04_evaluate.py", other, *flags)
    for path in (other / "answers").rglob("*.jsonl"):
        if "judged" not in path.name:
            assert path.read_bytes() == (work / path.relative_to(other)).read_bytes(), path.name


@pytest.mark.parametrize("script, flags", [
    pytest.param("02_sft_warmup.py", ("--objective", "sft", "--init", "none"), marks=pytest.mark.slow),
    ("03_rba_rl.py", ("--objective", "rba-group", "--init", "none"))])
def test_two_processes_have_the_gradients_of_one(copy, float32_model, script, flags):
    """float32; an odd number of groups, in two voices, of unequal lengths, and micro-batches of one."""
    gradients, logs = [], []
    for processes in (1, 2):
        work = copy(f"of-{processes}")
        rows = common.read_jsonl(work / "data" / "train.jsonl")
        common.write_jsonl(work / "data" / "train.jsonl", [row for row in rows if row["id"][-1] in "01"])
        sizes = ("--max-steps", 1, "--batch-size", 3, "--micro-tokens", 300 // processes, "--out", "x")
        if processes == 1:
            run_here(float32_model, script, work, *flags, *sizes, gradients=work / "gradients")
        else:
            run_stage(script, work, *flags, *sizes, processes=2, FLOAT32=1, GRADIENTS=work / "gradients")
        gradients.append(torch.load(work / "gradients", weights_only=True))
        logs.append(log_of(work, "x"))
    for one, two in zip(*gradients):
        assert (one - two).norm() <= 1e-3 * one.norm() + 1e-7
    for one, two in zip(*logs):
        losses = [key for key in one if key.startswith("loss")]
        assert one.keys() == two.keys()
        wanted = [two[key] for key in losses]
        assert [one[key] for key in losses] == pytest.approx(wanted, rel=1e-3)
    if "03" in script:
        one, two = (common.read_jsonl(work.with_name(name) / "samples" / "x.jsonl")
                    for name in ("of-1", "of-2"))
        assert [row["answer"] for row in one] == [row["answer"] for row in two]


def test_half_a_log_line_is_dropped_and_half_a_data_line_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert common.read_jsonl(tmp_path / "log.jsonl", torn=True) == [{"step": 1}, {"step": 2}]
    with pytest.raises(common.UserError, match=r"log.jsonl:3: no JSON object"):
        common.read_jsonl(tmp_path / "log.jsonl")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    common.write_text(tmp_path / "a.txt", "old")

    def fails(temporary):                                 # a stub: the failure must be forced
        temporary.write_text("ne")
        raise OSError(28, "No space left on device", str(temporary))
    with pytest.raises(OSError):
        common.write_atomic(tmp_path / "a.txt", fails)
    assert (tmp_path / "a.txt").read_text() == "old"


# --------------------------------------------------------------------------------------- what users get wrong
def drop_field(work):
    path = work / "data" / "train.jsonl"
    rows = common.read_jsonl(path)
    del rows[2]["response"]
    path.write_text(common.to_jsonl(rows))


def write(name, content):
    return lambda work: (work / name).write_bytes(content)


def other_rank(work):
    common.PRESETS["tiny"]["lora_r"] = 4                  # restored by the fixture


def remove(name):
    return lambda work: (work / name).unlink()


def served(work):
    config = dict(preset="tiny", teacher="smollm2-135m", served=True, language="French")
    common.write_json(work / "data" / "config.json", {"config": config})
    row = dict(id="0", audio="data/audio/0-0.wav", task="sqa", instruction="Who?", reference="Nobody")
    common.write_jsonl(work / "set.jsonl", [row])


def silence(work):
    soundfile.write(work / "data/audio/0-1.wav", np.zeros(16000), 16000)


BAD = {
    "unknown flag": ("02_sft_warmup.py", ["--rate", 1], None, "unrecognized arguments: --rate 1"),
    "no number": ("02_sft_warmup.py", ["--max-steps", "0"], None, "0 is not a whole number of at least 1"),
    "unknown preset": ("01_synthesize.py", ["--preset", "huge"], None, "invalid choice: 'huge'"),
    "another preset": ("02_sft_warmup.py", ["--preset", "small"], None, "were made with tiny"),
    "another teacher": ("02_sft_warmup.py", ["--teacher", "gpt2"], None, "were made with smollm2-135m"),
    "no data": ("02_sft_warmup.py", [], remove("data/train.jsonl"), "missing; run 01_synthesize.py first"),
    "half a line": ("02_sft_warmup.py", [], write("data/train.jsonl", b'{"id": 1}\n{"id"'),
                    "train.jsonl:2: no JSON object"),
    "a field lacks": ("02_sft_warmup.py", [], drop_field, "item 0-2 lacks response"),
    "no recording": ("02_sft_warmup.py", [], remove("data/audio/0-1.wav"), "0-1.wav"),
    "silence": ("02_sft_warmup.py", [], silence, "0-1.wav: silent"),
    "no sft": ("03_rba_rl.py", [], None, "sft.pt: missing; run the stage that writes it first"),
    "no checkpoint": ("03_rba_rl.py", [], write("sft.pt", b"zip"), "sft.pt: no checkpoint of this repo"),
    "rounds": ("03_rba_rl.py", ["--init", "none", "--rounds", 9, "--max-steps", 2], None,
               "--rounds 9: more than the 2 updates"),
    "out without objective": ("03_rba_rl.py", ["--out", "x"], None, "--out is for one --objective"),
    "nothing to evaluate": ("04_evaluate.py", ["--systems", "kd"], None, "kd"),
    "a condition": ("04_evaluate.py", ["--conditions", "clean,rain:3"], write("sft.pt", b"zip"),
                    "condition rain:3"),
    "no reward model": ("03_rba_rl.py", ["--reward", "assets"], write("sft.pt", b"zip"),
                        "assets: no reward model can be loaded"),
    "no results": ("04_evaluate.py", ["--draw", "README.md"], None, "README.md: no results.json"),
    "a served teacher": ("04_evaluate.py", ["--data", "{work}/set.jsonl", "--systems", "text"], served,
                         "--systems text: a served teacher answers in 01 alone"),
    "no s2tt": ("01_synthesize.py", ["--preset", "small", "--s2tt", "covost2:x.tsv"], None,
                "--s2tt: no split asks for s2tt"),
    "a recording": ("04_evaluate.py", ["--ask", "gone.wav", "--systems", "base"], None, "gone.wav"),
    "a voice": ("01_synthesize.py", ["--train", "poems=3"], None, "poems=3 is not TASK=NUMBER")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, copy, model, monkeypatch, capsys):
    script, flags, change, said = BAD[name]
    work = copy()
    if change:
        change(work)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    monkeypatch.setattr(common, "load_speechlm", lambda *_: model)
    flags = [str(flag).format(work=work) for flag in flags]
    monkeypatch.setattr(sys, "argv", [script, "--work", str(work), *flags])
    with pytest.raises(SystemExit) as ended:
        common.run(stage(script.removesuffix(".py")).main)
    out = capsys.readouterr()
    last = out.err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: ") and said in last, out.err[-500:]
    assert "Traceback" not in out.err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_another_configuration_is_refused(tmp_path):
    path = tmp_path / "sft.config.json"
    for _ in range(2):                                    # the same again goes on
        common.record_config(path, {"steps": 1, "init": None})
    before = path.read_bytes()
    with pytest.raises(common.UserError, match="made with steps 1, not 2; use another --work or --out$"):
        common.record_config(path, {"steps": 2, "init": None})
    assert path.read_bytes() == before
