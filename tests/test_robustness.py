"""Kills, two processes, bad input, gradients that are not finite, memory. The full kill table: python tests/kill.py."""
import contextlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import BOTH, ROOT, SYSTEMS, TRAIN, stage
from kill import DATA, TEST_SIZES, differences, finish, link_tree, start

import common


@pytest.fixture
def copy(work, tmp_path):
    """The finished run of `work` in a directory of its own, to be cut or damaged."""
    link_tree(work, tmp_path / "work")
    return tmp_path / "work"


def replace(path, content):
    """New content under the same name; the original, of which the copy is a hard link, stays as it is."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# -------------------------------------------------------------------------------------------- kills, two processes
def dies_in_one_of_two(script, work, flags, die_at):
    """Two processes, the second killed half way through a write: the first must end within a minute, and say so."""
    process = start(script, work, flags, processes=2, DIE_AT=die_at, DIE_RANK=1, DIED=work / "died")
    _, err = process.communicate()
    assert time.time() - (work / "died").stat().st_mtime < 60
    (work / "died").unlink()
    assert process.returncode != 0 and "SIGKILL" in err.replace("Signal 9", "SIGKILL"), err[-3000:]
    return err


@pytest.mark.slow
def test_01_with_a_process_killed_in_a_write_goes_on_with_two(work, tmp_path):
    (tmp_path / "data" / "batches").mkdir(parents=True)
    for path in (work / "data" / "batches").glob("[is][nq]*"):     # as if instruct and sqa were done before: they take longest
        os.link(path, tmp_path / "data" / "batches" / path.name)
    dies_in_one_of_two("01_synthesize.py", tmp_path, DATA, 1)
    assert not (tmp_path / "data" / "train.jsonl").exists()
    finish(start("01_synthesize.py", tmp_path, DATA, processes=2))
    extra = [name for name in differences(work, tmp_path, ["data"]) if "batches" not in name]   # a round may sample one batch more
    assert extra == []


def test_02_killed_in_writes_repeats_every_loss(work, tmp_path):
    link_tree(work / "data", tmp_path / "data")
    finish_killed("02_sft_warmup.py", tmp_path, [*TRAIN, "--objective", "sft"], 12)   # heard, config, best, then log and resume file
    assert len(common.read_jsonl(tmp_path / "logs" / "sft.jsonl")) == 2
    assert differences(work, tmp_path, ["sft.pt", "sft.best.pt", "sft.config.json", "logs/sft.jsonl"]) == []


def finish_killed(script, work, flags, die_at):
    assert start(script, work, flags, DIE_AT=die_at).wait() == -signal.SIGKILL
    finish(start(script, work, flags))


def test_02_has_the_same_gradients_in_two_processes(work, tmp_path):
    """In float32, as in bfloat16 another micro-batch moves the loss by half a percent."""
    flags = ["--objective", "sft", *TRAIN[2:], "--max-steps", 1, "--out"]
    runs = [start("02_sft_warmup.py", work, [*flags, name], processes=processes, FLOAT32=1, GRADIENTS=tmp_path / name)
            for processes, name in ((1, "one"), (2, "two"))]
    for run in runs:
        finish(run)
    same_gradients(tmp_path / "one", tmp_path / "two")
    [one], [two] = (common.read_jsonl(work / "logs" / f"{name}.jsonl") for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def same_gradients(one, two, close=1e-3):
    """Equal but for the order of sums in another micro-batch."""
    one, two = (torch.cat([g.flatten() for g in torch.load(path, weights_only=True)]) for path in (one, two))
    assert float(two.norm()) == pytest.approx(float(one.norm()), rel=close) and float(one.norm()) > 1e-3
    assert float(torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0)) > 1 - close / 10


def test_03_killed_in_a_write_repeats_every_step(work, copy):
    for output in ("rba.pt", "logs/rba.jsonl", "plots/rba.png"):
        (copy / output).unlink()
    flags = ["--max-steps", 2, "--batch-size", 2, "--k", 2, "--out", "rba"]
    finish_killed("03_rba_rl.py", copy, flags, 3)         # a log line, the resume file, its folder
    assert differences(work, copy, ["rba.pt", "logs/rba.jsonl", "plots/rba.png", "rba.config.json"]) == []


def test_03_has_the_same_gradients_in_two_processes(work, tmp_path):
    """On the same rollouts, with every part of the advantage; in float32, as bfloat16 alone moves the logp reward by 2 %."""
    rollouts = shutil.copy(work / "rba+opd.rollouts", tmp_path)
    finish(start("03_rba_rl.py", work, [*BOTH, "--out", "two-rl"], processes=2, FLOAT32=1, ROLLOUTS=rollouts,
                 GRADIENTS=tmp_path / "two"))
    same_gradients(work / "rba+opd.gradients", tmp_path / "two")
    [one], [two] = (common.read_jsonl(work / "logs" / f"{name}.jsonl") for name in ("rba+opd", "two-rl"))
    for name in ("semantic", "logp"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    for name in ("loss", "token_reward", "tokens", "kl", "entropy"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_04_with_a_process_killed_in_a_write_goes_on_with_two(work, copy):
    for system in ("sft", "rba"):
        (copy / "answers" / "test_all" / f"{system}.babble-5.jsonl").unlink()
    shutil.rmtree(copy / "heard" / "test_all.babble-5")
    replace(copy / "results.json", "{}")
    dies_in_one_of_two("04_evaluate.py", copy, SYSTEMS, 1)
    finish(start("04_evaluate.py", copy, SYSTEMS, processes=2))
    assert differences(work, copy, ["answers", "results.json", "results.md", "results.png", "heard"]) == []


def test_a_worker_left_alone_says_so_in_one_line(tmp_path):
    """Without torchrun's agent too (another launcher, another node): a collective call that fails is one line, exit code 2."""
    code = ("import common, os, sys, time\n"
            "def main():\n"
            "    common.setup_processes()\n"
            "    common.barrier()\n"
            "    os.environ['RANK'] == '1' and os._exit(9)\n"
            "    common.gather([1])\n"
            "common.run(main)\n")
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    started = time.time()
    ranks = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
             for rank in (0, 1)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 9] and time.time() - started < 60
    assert errors[0].strip().splitlines()[-1].startswith("error: another process of this run has ended")


def test_two_runs_in_one_place_are_refused(tmp_path):
    common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 4})
    common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 4})
    with pytest.raises(common.UserError, match="k: 4 -> 8"):
        common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 8})
    ours = f".a.pt.{platform.node()}"
    (tmp_path / f"{ours}-4194305.rba-tmp").touch()        # no process has a number this large: left by a kill
    (tmp_path / f"{ours}-{os.getpid()}.rba-tmp").touch()
    (tmp_path / ".report.4194305.tmp").touch()            # not ours
    code = f"import common, pathlib; common.run(lambda: common.record_config(pathlib.Path({str(tmp_path)!r}) / 'c.json', dict(lr=1e-4, k=4)))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and "another run is writing here" in other.stderr
    common.record_config(tmp_path / "c.json", {"lr": 1e-4, "k": 4})
    assert not (tmp_path / f"{ours}-4194305.rba-tmp").exists() and (tmp_path / f"{ours}-{os.getpid()}.rba-tmp").exists()
    assert (tmp_path / ".report.4194305.tmp").exists()


def test_half_a_log_line_is_dropped_and_half_a_data_line_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    common.append_jsonl(path, dict(step=0, loss=math.nan, sample=dict(score=math.inf)))
    assert common.read_jsonl(path) == [dict(step=0, loss=None, sample=dict(score=None))]
    with open(path, "a") as file:
        file.write('{"step": 1, "te')
    assert len(common.read_jsonl(path, torn=True)) == 1
    with pytest.raises(common.UserError, match="log.jsonl:2: not a JSON object"):
        common.read_jsonl(path)
    replace(path, json.dumps(dict(id="a", text="one\u2028two"), ensure_ascii=False) + "\n\n")   # no end of line for JSON
    assert common.read_jsonl(path) == [dict(id="a", text="one\u2028two")]


# -------------------------------------------------------------------------------------------------------- bad input
def edit(name, change):
    """Damage: change(lines of data/NAME) -> its new lines (bytes)."""
    def damage(work):
        path = work / "data" / name
        replace(path, b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    return damage


def field(name, value, split="train"):
    """Damage: the field of the second item."""
    return edit(f"{split}.jsonl", lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | {name: value}).encode(), *lines[2:]])


def audio(samples=None, content=None, rate=16000):
    """Damage: the first train item's audio file."""
    def damage(work):
        shutil.rmtree(work / "heard")
        path = work / "data" / common.read_items(work, "train")[0]["audio"]
        path.unlink()
        if samples is not None:
            soundfile.write(path, np.asarray(samples, np.float32), rate, "FLOAT")
        elif content is not None:
            path.write_bytes(content)
    return damage


def pipe(work):
    audio()(work)
    os.mkfifo(work / "data" / common.read_items(work, "train")[0]["audio"])


def sample_rate(work):
    audio(np.random.default_rng(0).normal(0, .1, 4000))(work)
    path = work / "data" / common.read_items(work, "train")[0]["audio"]
    header = bytearray(path.read_bytes())
    header[24:28] = (2_000_000).to_bytes(4, "little")
    path.write_bytes(header)


def cut_wav(work):
    shutil.rmtree(work / "heard")
    replace(work / "gap.json", '{"of"')
    path = work / "data" / common.read_items(work, "train")[0]["audio"]
    replace(path, path.read_bytes()[:path.stat().st_size // 3])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def checkpoint(change):
    """Damage: sft.pt becomes torch.save(change(its content)), or the bytes that change returns."""
    def damage(work):
        held = change(torch.load(work / "sft.pt", weights_only=True))
        (work / "sft.pt").unlink()
        torch.save(held, work / "sft.pt") if not isinstance(held, bytes) else (work / "sft.pt").write_bytes(held)
    return damage


def first_weight(value):
    def change(held):
        next(iter(held["state"].values()))[0] = value
        return held
    return checkpoint(change)


def preset(**values):
    """Damage: other values in the tiny preset (restored by the test)."""
    return lambda work: common.PRESETS["tiny"].update(values)


def other_tokens(work):
    tokenizer, llm = common.load_llm("smollm2-135m")
    own = tokenizer.train_new_from_iterator(["a text of some words to learn a few tokens from"] * 9, 300)
    own.chat_template = tokenizer.chat_template
    own.save_pretrained(work / "teacher")
    llm.save_pretrained(work / "teacher")
    other_teacher(work)
    config = json.loads((work / "data" / "config.json").read_text())
    config["config"]["teacher"] = str(work / "teacher")
    replace(work / "data" / "config.json", json.dumps(config))


def other_teacher(work):
    common.PRESETS["tiny"]["teacher"] = str(work / "teacher")


def reward(values):
    """Damage: a reward model that gives these values, however many answers it gets. A stub: the failure must be forced."""
    def damage(work):
        common.RewardModel = lambda name, device: lambda items, answers: values
    return damage


def full_disk(work):
    shutil.rmtree(work / "heard")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))


def locked(work):
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
                               "print('held', flush=True); time.sleep(60)", work / ".bad.config.lock"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    locked.holders.append(holder)


locked.holders = []


def no_network(work):
    os.environ |= {"RBA_CACHE": str(work / "cache"), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    common.PRESETS["tiny"]["student"] = "smollm2-135m"


def damaged_cache(work):
    shutil.copytree(common.resolve("minilm-l6"), work / "cache" / "minilm-l6")
    os.truncate(work / "cache" / "minilm-l6" / "model.safetensors", 1000)
    (work / "cache" / "smollm2-135m").symlink_to(common.resolve("smollm2-135m"))          # whose size is estimated before
    os.environ["RBA_CACHE"] = str(work / "cache")


def other_bound(work):
    (work / "data" / "config.json").unlink()
    common.PRESETS["tiny"]["wer_bound"] = -1.0


def own_data(row):
    def damage(work):
        (work / "mine.jsonl").write_text(json.dumps(row) + "\n")
    return damage


def nothing(work):
    pass


WARM, SFT1, RL, EVAL = "02_sft_warmup.py", ["--objective", "sft", "--max-steps", "1", "--batch-size", "4", "--out", "bad"], "03_rba_rl.py", "04_evaluate.py"
RL1 = ["--max-steps", "1", "--batch-size", "2", "--k", "2", "--out", "bad"]
NOISE = np.random.default_rng(0).normal(0, .1, 16000 * 31)
OWN = dict(id="a", audio="data/audio/x.wav", task="sqa", instruction="Who is it?", reference="Ann")
BAD = {
    "unknown preset": ("01_synthesize.py", ["--preset", "huge"], nothing, "no such preset"),
    "unknown flag": ("01_synthesize.py", ["--frobnicate"], nothing, "--frobnicate"),
    "no number": ("01_synthesize.py", ["--n-train", "many"], nothing, "--n-train"),
    "too few items": ("01_synthesize.py", ["--n-train", "1"], nothing, "--n-train 1: at least 3"),
    "other configuration": ("01_synthesize.py", ["--n-train", "13", *DATA[2:]], nothing, "n_train: 12 -> 13"),
    "damaged configuration": ("01_synthesize.py", DATA, lambda work: replace(work / "data" / "config.json", "{"), "not a configuration"),
    "all items filtered out": ("01_synthesize.py", DATA, other_bound, "no instruct item of train"),
    "unknown voice": ("01_synthesize.py", DATA, lambda w: (preset(voices="joe")(w), (w / "data" / "config.json").unlink()), "voice joe"),
    "unknown style": ("01_synthesize.py", DATA, lambda w: (preset(voices="kokoro-jf_x")(w), (w / "data" / "config.json").unlink()), "kokoro-jf_x"),
    "batch file cut": ("01_synthesize.py", DATA, lambda w: replace(w / "data" / "batches" / "sqa-0000.jsonl", '{"id": '), "sqa-0000.jsonl:1"),
    "no input": (WARM, SFT1, lambda work: shutil.rmtree(work / "data"), "train.jsonl: missing; run 01_synthesize.py"),
    "empty input": (WARM, SFT1, lambda work: replace(work / "data" / "valid.jsonl", ""), "valid.jsonl: no item"),
    "truncated line": (WARM, SFT1, edit("train.jsonl", lambda lines: [*lines[:2], lines[2][:50]]), "train.jsonl:3: not a JSON object"),
    "not UTF-8": (WARM, SFT1, edit("train.jsonl", lambda lines: [lines[0], b'{"id": "\xff"}']), "train.jsonl:2: not a JSON object"),
    "a list": (WARM, SFT1, edit("train.jsonl", lambda lines: [b"[1]"]), "train.jsonl:1: not a JSON object"),
    "missing field": (WARM, SFT1, edit("train.jsonl", lambda lines: [b'{"id": "a"}']), "train.jsonl:1: item a: lacks the field task"),
    "wrong type": (WARM, SFT1, field("response", 5), "train.jsonl:2: item"),
    "not a number": (WARM, SFT1, field("seconds", math.nan), "lasts nan seconds"),
    "unknown task": (WARM, SFT1, field("task", "summary"), "has the task summary"),
    "double id": (WARM, SFT1, edit("train.jsonl", lambda lines: [*lines, lines[0]]), "stands already in line 1"),
    "no words": (WARM, SFT1, field("text", "(?!) ..."), "no words are left"),
    "reference without words": (WARM, SFT1, field("reference", ["..."]), "no words are left"),
    "no item of a task": (WARM, SFT1, edit("train.jsonl", lambda lines: [x for x in lines if b'"sqa"' not in x]), "no item of the task sqa"),
    "batch larger than the data": (WARM, [*SFT1, "--batch-size", "999"], nothing, "a batch of 999 is larger than the"),
    "audio missing": (WARM, SFT1, audio(), "no such file"),
    "audio empty": (WARM, SFT1, audio(content=b""), "no readable audio"),
    "audio corrupt": (WARM, SFT1, audio(content=b"RIFF\xff\xff\xff\x7fWAVEfmt " + bytes(range(200))), "no readable audio"),
    "audio of zero length": (WARM, SFT1, audio([]), "silent or shorter than 0.1 s"),
    "audio silent": (WARM, SFT1, audio(np.zeros(16000)), "silent"),
    "audio DC only": (WARM, SFT1, audio(np.full(16000, 0.5)), "silent"),
    "audio NaN": (WARM, SFT1, audio(np.full(16000, np.nan)), "holds NaN"),
    "audio too long": (WARM, SFT1, audio(NOISE), "longer than 12 s"),
    "audio at 2 MHz": (WARM, SFT1, sample_rate, "a sample rate of"),
    "audio a pipe": (WARM, SFT1, pipe, "no such file"),
    "audio outside": (WARM, SFT1, lambda w: (shutil.rmtree(w / "heard"), field("audio", "../../x.wav")(w)), "audio path ../../x.wav leaves"),
    "audio absolute": (WARM, SFT1, lambda w: (shutil.rmtree(w / "heard"), field("audio", "/etc/passwd")(w)), "audio path /etc/passwd leaves"),
    "heard file cut": (WARM, SFT1, lambda w: replace(w / "heard" / "train.clean" / "0000.pt", b"PK\3\4"), "no rba-heard-1"),
    "unknown objective": (WARM, ["--objective", "dpo"], nothing, "--objective dpo"),
    "negative rate": (WARM, ["--lr", "-1"], nothing, "--lr"),
    "kd with other token ids": (WARM, ["--objective", "kd", *SFT1[2:]], other_tokens, "different token ids"),
    "another teacher than the data's": (WARM, SFT1, other_teacher, "were made with --teacher smollm2-135m"),
    "work is a file": ("01_synthesize.py", DATA, lambda work: (shutil.rmtree(work), work.write_text("")), "cannot be written"),
    "disk full": (WARM, SFT1, full_disk, "cannot be written"),
    "another run writes": (WARM, SFT1, locked, "another run is writing here"),
    "no checkpoint": (RL, RL1, lambda work: (work / "sft.pt").unlink(), "sft.pt: missing"),
    "damaged gap.json and a cut wav": (WARM, ["--max-steps", "1", "--batch-size", "2"], cut_wav, "and not"),
    "half of a surrogate pair": (WARM, SFT1, field("response", "Hi \ud83d"), "half of a surrogate pair"),
    "a list as id": (WARM, SFT1, field("id", ["a"]), "the field id is"),
    "name of an untrained system": (WARM, [*SFT1[:-1], "init"], nothing, "--out init"),
    "out of the directory": (WARM, [*SFT1[:-1], "../x"], nothing, "--out ../x"),
    "empty flag": (EVAL, ["--systems", ""], nothing, "--systems: empty"),
    "huge rate": (WARM, ["--lr", "1e39"], nothing, "at most 1e9"),
    "a seed of the untrained": (WARM, [*SFT1[:-1], "text-s1"], nothing, "--out text-s1"),
    "init without objective": (WARM, ["--init", "x.pt"], nothing, "--init and --out are for one --objective"),
    "other preset": (EVAL, ["--preset", "small"], nothing, "were made with --preset tiny"),
    "checkpoint without config": (WARM, [*SFT1[:-1], "sft"], lambda w: (w / "sft.config.json").unlink(), "stands here without sft.config.json"),
    "checkpoint without weights": (RL, RL1, checkpoint(lambda held: held | {"state": None}), "lacks state"),
    "a batch file with other items": ("01_synthesize.py", DATA, lambda w: replace(w / "data" / "batches" / "speech-0001.jsonl", ""), "does not hold"),
    "a row without fields": ("01_synthesize.py", DATA, lambda w: replace(w / "data" / "batches" / "sqa-0000.jsonl", "{}"), "lacks the field"),
    "answers without fields": (EVAL, list(SYSTEMS), lambda w: replace(w / "answers" / "test_all" / "sft.clean.jsonl", "{}"), "lacks the field"),
    "reward twice": (RL, ["--rewards", "task=1,task=2"], nothing, "task twice"),
    "a raw file": (EVAL, ["--ask", "question.raw"], lambda w: (w / "question.raw").write_bytes(bytes(1000)), "no readable audio"),
    "a question for a path": (EVAL, ["--ask", "What is " * 100], nothing, "no readable audio"),
    "ask text": (EVAL, ["--ask", "x.wav", "--systems", "text"], nothing, "hears nothing"),
    "pickle as checkpoint": (RL, RL1, checkpoint(lambda held: __import__("pickle").dumps(Bomb())), "no rba-speechlm-1 checkpoint"),
    "pickle in a checkpoint": (RL, RL1, checkpoint(lambda held: held | {"bomb": Bomb()}), "no rba-speechlm-1 checkpoint"),
    "checkpoint cut": (RL, RL1, checkpoint(lambda held: b"PK\3\4" + bytes(1000)), "no rba-speechlm-1 checkpoint"),
    "checkpoint empty": (RL, RL1, checkpoint(lambda held: b""), "no rba-speechlm-1 checkpoint"),
    "a folder as checkpoint": (RL, [*RL1, "--init", "/tmp"], nothing, "no rba-speechlm-1 checkpoint"),
    "other torch file": (RL, RL1, checkpoint(lambda held: held["state"]), "not written by this repo"),
    "checkpoint of another model": (RL, RL1, checkpoint(lambda held: held | {"config": held["config"] | {"lora_r": 4}}), "of another model (lora_r"),
    "checkpoint with NaN": (RL, RL1, first_weight(math.nan), "weights that are not finite"),
    "K of 1 with loo": (RL, ["--k", "1"], nothing, "the loo baseline needs at least 2"),
    "temperature of 0": (RL, ["--temperature", "0"], nothing, "--temperature 0.0: must be at least 0.01"),
    "unknown baseline": (RL, ["--baseline", "mean"], nothing, "--baseline mean"),
    "unknown reward": (RL, ["--rewards", "beauty=1"], nothing, "--rewards beauty=1"),
    "no reward": (RL, ["--rewards", "none"], nothing, "no reward"),
    "no reward model": (RL, [*RL1, "--rewards", "rm=1"], nothing, "this preset names none"),
    "wrong reward model": (RL, [*RL1, "--rewards", "rm=1"], preset(reward_model="/tmp"), "no reward model can be loaded"),
    "reward NaN": (RL, [*RL1, "--rewards", "rm=1"], reward([math.nan] * 4), "reward rm is not a finite number for item"),
    "reward of wrong length": (RL, [*RL1, "--rewards", "rm=1"], reward([1.0]), "reward rm gave 1 values for 4 answers"),
    "RL batch larger than the data": (RL, [*RL1, "--batch-size", "999"], nothing, "a batch of 999 prompts is larger"),
    "nothing to evaluate": (EVAL, [], lambda work: [p.unlink() for p in work.glob("*.pt")], "no checkpoint"),
    "unknown system": (EVAL, ["--systems", "gpt"], nothing, "--systems gpt"),
    "unknown condition": (EVAL, ["--conditions", "clean,noise:loud"], nothing, "condition noise:loud"),
    "impossible condition": (EVAL, ["--conditions", "reverb:0"], nothing, "condition reverb:0"),
    "checkpoint to evaluate cut": (EVAL, [], lambda work: replace(work / "kd.pt", b"PK\3\4"), "kd.pt: no rba-speechlm-1"),
    "seeds of two systems": (EVAL, [], lambda work: shutil.copy(work / "sft.pt", work / "rba-s1.pt"), "rba-s1.pt is no other seed of rba.pt"),
    "answers cut": (EVAL, [], lambda w: replace(w / "answers" / "test_all" / "sft.clean.jsonl", '{"id"'), "run 04_evaluate.py again"),
    "nothing to draw": (EVAL, ["--draw", "data/config.json"], nothing, "no results.json of this script"),
    "question missing": (EVAL, ["--ask", "gone.wav"], nothing, "gone.wav: no such file"),
    "own data without reference": (EVAL, ["--data", "mine.jsonl"], own_data({k: OWN[k] for k in OWN if k != "reference"}), "has no reference"),
    "own data without audio": (EVAL, ["--data", "mine.jsonl"], own_data(OWN), "no such file"),
    "own data of another type": (EVAL, ["--data", "mine.jsonl"], own_data(OWN | {"id": 3}), "the field id is 3"),
    "no such set": (EVAL, ["--data", "mustc:data"], nothing, "--data mustc:data: cannot be read as published"),
    "judge not served": (EVAL, ["--judge", "http://127.0.0.1:9/v1"], nothing, "no answer from models"),
    "judge that is no model": (EVAL, ["--judge", "data"], nothing, "data: no reward model can be loaded"),
    "targets without a set": (WARM, ["--targets", "teacher"], nothing, "with --data alone"),
    "a set without a name": (WARM, ["--data", "mine.jsonl"], own_data(OWN), "--data needs --objective and --out"),
    "no network": (EVAL, ["--ask", "data/audio"], no_network, "no such file"),
    "no network at first use": ("01_synthesize.py", ["--work", "new"], no_network, "pip could not download"),
    "damaged model cache": (RL, RL1, damaged_cache, "which is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, copy, model, monkeypatch, capsys):
    """Exit code 2, one line with what, where and what to do, no file harmed, no code of the data executed."""
    script, flags, damage, words = BAD[name]
    monkeypatch.setattr(common, "PRESETS", common.PRESETS | {"tiny": common.PRESETS["tiny"] | {"max_new": 40}})
    for size, value in TEST_SIZES.items():
        monkeypatch.setattr(stage("01_synthesize"), size, value, raising=False)
    monkeypatch.setattr(common, "RewardModel", common.RewardModel)
    monkeypatch.setattr(common, "load_speechlm", lambda *_: model)   # loaded once; what it is given is what fails
    monkeypatch.chdir(copy)
    with contextlib.ExitStack() as restored:
        restored.enter_context(mock.patch.dict(os.environ))     # what a case sets does not outlive it
        restored.callback(model.load, "none")
        restored.callback(resource.setrlimit, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
        restored.callback(lambda: [holder.kill() for holder in locked.holders])
        damage(copy)
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in copy.rglob("*") if p.is_file() and p.suffix != ".lock"}
        monkeypatch.setattr(sys, "argv", [script, "--work", str(copy), *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(stage(script.removesuffix(".py")).main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") or "Traceback" in line]
    print(f"{name}: {lines}")
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in before} == before
    assert not list(copy.rglob("*tmp")) and not (copy / "executed").exists()


@pytest.mark.parametrize("script, flags, left", [("02_sft_warmup", TRAIN, ["sft", "sft+"]), ("03_rba_rl", ("--max-steps", 1, "--batch-size", 2), ["rba"])])
def test_processes_leave_out_together_what_one_of_them_cant_do(script, flags, left, copy, model, monkeypatch):
    """Another process has no teacher: kd and opd must not run here either. It is played by what `gather` gives."""
    ran = []
    monkeypatch.setattr(common, "load_speechlm", lambda *_: model)
    monkeypatch.setattr(common, "Teacher", lambda *_: object())
    monkeypatch.setattr(stage(script), "train", lambda *args, **_: ran.append(next(arg for arg in args if isinstance(arg, str))))   # its name
    monkeypatch.setattr(common, "gather", lambda own: [*own, False])
    monkeypatch.setattr(sys, "argv", [script, "--work", str(copy), *map(str, flags)])
    stage(script).main()
    assert ran == left


def test_a_torch_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "torchaudio.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    done = subprocess.run([sys.executable, ROOT / "03_rba_rl.py", "--help"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == "" and "libcudart.so.12" in done.stderr and done.stderr.count("\n") == 1
    for path in ROOT.glob("0?_*.py"):                     # before any other package that is not Python's own
        imported = [line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert next(name for name in imported if name not in sys.stdlib_module_names) == "common", path
    if not torch.cuda.is_available():                     # a driver that torch can't use
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(common.UserError, match="can't use this machine's GPU"):
            common.setup_processes()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    common.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")
    with pytest.raises(common.UserError, match="No space left"):
        common.write_atomic(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(common.UserError, match="No space left"):
        common.append_jsonl(tmp_path / "log.jsonl", {"step": 1})


# --------------------------------------------------------------------------------- gradients that are not finite, memory
@pytest.fixture
def train_sft(work, model, tmp_path, monkeypatch):
    """02's main() in this process, on the session's model: train_sft(flags) in a working directory of its own."""
    link_tree(work / "data", tmp_path / "data")
    link_tree(work / "heard", tmp_path / "heard")
    monkeypatch.setattr(common, "load_speechlm", lambda *_: model)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["02_sft_warmup.py", "--work", str(tmp_path), "--objective", "sft", "--batch-size", "2", *map(str, flags)])
        stage("02_sft_warmup").main()
        return tmp_path
    yield run
    model.load("none")


def test_steps_without_a_finite_gradient_are_skipped_counted_and_stop_in_the_end(train_sft, model, monkeypatch):
    sft, calls = stage("02_sft_warmup"), []
    real = sft.sft_loss

    def breaks(*args):
        calls.append(None)
        return real(*args) * (math.nan if len(calls) in broken else 1.0)
    monkeypatch.setattr(sft, "sft_loss", breaks)
    broken = {2, 3}
    folder = train_sft("--max-steps", 4, "--out", "twice")
    rows = common.read_jsonl(folder / "logs" / "twice.jsonl")
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False] == [row["loss"] is None for row in rows]
    assert all(p.isfinite().all() for p in model.trainable().values())
    calls.clear()
    broken = set(range(2, 100))
    for _ in range(2):                                    # the last update of all is one of them: it may not count as done when it is run again
        with pytest.raises(common.UserError, match="5 updates in a row .*5 of 6 in all"):
            train_sft("--max-steps", 6, "--out", "stops")
        assert not (folder / "stops.pt").exists()
    stopped = torch.load(folder / "stops.stopped.pt", weights_only=True)["state"]
    assert all(value.isfinite().all() for value in stopped.values())
    assert any(value.abs().max() > 0 for name, value in stopped.items() if "lora_B" in name)   # the first update is in it


def test_a_learning_rate_spike_does_not_overwrite_the_best(train_sft):
    folder = train_sft("--max-steps", 4, "--lr", 1.0, "--out", "spike")
    rows = common.read_jsonl(folder / "logs" / "spike.jsonl")
    best = torch.load(folder / "spike.best.pt", weights_only=True)
    assert rows[-1]["valid_nll"] is None or rows[-1]["valid_nll"] > 1.5 * best["metrics"]["valid_nll"]
    assert best["metrics"]["step"] == 0 and all(value.abs().max() == 0 for name, value in best["state"].items() if "lora_B" in name)


@pytest.fixture
def small(work, tmp_path):
    """`work` with an LLM of two small random layers, whose steps are short: what could pile up is the same. -> (folder, PRESET)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer, llm = common.load_llm("smollm2-135m")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(**llm.config.to_dict() | sizes | {"head_dim": 16})).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    link_tree(work / "data", tmp_path / "work" / "data")
    preset = dict(student=str(tmp_path / "llm"), teacher=str(tmp_path / "llm"), max_new=16)
    finish(start("02_sft_warmup.py", tmp_path / "work", ["--objective", "sft", *TRAIN], PRESET=json.dumps(preset)))
    return tmp_path / "work", preset


def memory_of(process, progress):
    """[(progress(), MB resident)] every second until the process ends by itself."""
    samples, ended = [], threading.Thread(target=finish, args=(process,))   # its output has to be read all the while
    ended.start()
    while ended.is_alive():
        with contextlib.suppress(OSError, IndexError):
            status = open(f"/proc/{process.pid}/status").read()
            samples.append((progress(), int(status.split("VmRSS:")[1].split()[0]) // 1024))
        time.sleep(1)
    assert process.returncode == 0
    print(f"MB at every twentieth of the time: {[mb for _, mb in samples[::max(1, len(samples) // 20)]]}")
    return samples


def growth(samples, low, high):
    """MB by which the highest use grew from the first half of [low, high], in progress, to the second half."""
    middle = (low + high) / 2
    first, last = ([mb for at, mb in samples if a <= at < z] for a, z in ((low, middle), (middle, high + 1)))
    return max(last) - max(first)


@pytest.mark.slow
def test_memory_is_flat_over_1_000_updates(small):
    folder, preset = small
    log = folder / "logs" / "long.jsonl"
    log.touch()
    process = start("03_rba_rl.py", folder, ["--max-steps", 1000, "--batch-size", 2, "--k", 2, "--token-reward", 0.1, "--out", "long"],
                    PRESET=json.dumps(preset))
    samples = memory_of(process, lambda: log.read_bytes().count(b"\n"))
    assert len(common.read_jsonl(log)) == 1000 and growth(samples, 100, 1000) < 100


@pytest.mark.parametrize("script, flags", [("02_sft_warmup", "--micro-tokens, --batch-size"), ("03_rba_rl", "--micro-tokens, --k, --batch-size")])
def test_memory_that_runs_out_names_the_flags_to_lower(script, flags, capsys):
    def main():
        common.parse_args("", stage(script).FLAGS, [])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(SystemExit) as ended:
        common.run(main)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.endswith(f"; out of memory: use a smaller {flags}")


@pytest.mark.slow
def test_the_memory_estimate_is_near_the_peak(tmp_path):
    """What torch allocates above the models, by its profiler: an update of micro_tokens tokens, and a rollout. -s shows both."""
    model, args = common.load_speechlm(common.PRESETS["tiny"]), common.parse_args("", {}, ["--work", str(tmp_path)])
    prompts = [torch.randn(70, model.llm.config.hidden_size) for _ in range(11)]          # 11 rows of 70 + 23 tokens: 1023

    def update():
        with common.autocast(model.llm):
            log_probs = common.token_log_probs(model.llm, *common.answer_states(model.llm, prompts, [[5] * 24] * 11))
        log_probs.sum().backward()

    def rollout():
        with common.autocast(model.llm):
            common.sample(model.llm, prompts[:8], -1, args.max_new, [[1, 2, 3, 4]] * 8)

    def peak(work):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]") / 1e9
    parts = common.estimate_memory(args, 32)
    for name, work, own in (("update", update, ("activations", "logits of a chunk")), ("rollout", rollout, ("merged weights while sampling",
                                                                                                            "keys and values", "logits of a chunk"))):
        estimated, measured = sum(parts[part] for part in own), peak(work)
        print(f"\n{name}: estimated {estimated:.2f}, measured {measured:.2f} GB")
        assert 0.7 * measured < estimated < 1.4 * measured
    held = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    assert parts["weights"] == pytest.approx(held, rel=0.1)


def small_whisper(path):
    """A narrow Whisper of random weights whose every transcript is one token: the last LayerNorm is constant and says so."""
    torch.manual_seed(0)
    dims = whisper.model.ModelDimensions(n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=1, n_audio_layer=1, n_vocab=51864,
                                         n_text_ctx=448, n_text_state=64, n_text_head=1, n_text_layer=1)
    asr = whisper.model.Whisper(dims)
    with torch.no_grad():
        asr.encoder.positional_embedding.normal_()
        asr.decoder.positional_embedding.normal_()
        asr.decoder.ln.weight.zero_()
        asr.decoder.ln.bias.fill_(1.0)
        asr.decoder.token_embedding.weight[whisper.tokenizer.get_tokenizer(False).eot] = 10.0    # once it is allowed, after a first token
    torch.save({"dims": vars(dims), "model_state_dict": asr.state_dict()}, path)


@pytest.mark.slow
def test_memory_is_flat_over_10_000_items(small, work):
    """Short questions, heard and answered by small models."""
    folder, preset = small
    small_whisper(folder / "whisper.pt")
    preset = preset | {"whisper": str(folder / "whisper.pt")}
    item, voices = common.read_items(work, "valid")[0], stage("01_synthesize").Voices("piper-joe")
    texts, seconds = ("What is the capital of France?", "I am going to the store.", "Where is the river Rhine?", "Tell me a story.",
                      "How do birds fly?"), []
    for i, text in enumerate(texts):
        wave, rate = voices.say("piper-joe", text, 1.2)
        seconds.append(len(wave) / rate)
        soundfile.write(folder / "data" / "audio" / f"short-{i}.wav", wave, rate)
    common.write_jsonl(folder / "data" / "test_all.jsonl", [item | dict(
        id=f"{i:05d}", text=texts[i % 5], audio=f"audio/short-{i % 5}.wav", seconds=seconds[i % 5], task=common.TASKS[i % 3]) for i in range(10_000)])
    heard = folder / "heard" / "test_all.noise-20"
    process = start("04_evaluate.py", folder, ["--systems", "init", "--conditions", "noise:20"],
                    PRESET=json.dumps(preset | {"max_new": 4}))
    samples = memory_of(process, lambda: 64 * len(list(heard.glob("*.pt"))))
    answering = [(second, mb) for second, (at, mb) in enumerate(samples) if at >= 10_000]
    first, last = answering[0][0], answering[-1][0]
    assert growth(samples, 1000, 9_999) < 100             # while it listens
    assert growth(answering, first + (last - first) // 10, first + (last - first) * 8 // 10) < 200   # while it answers
