"""Real embedded models, loaded once a session, in the precision that users run; a skipped test counts as
failed in CI unless it needs a GPU."""
import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import run_stage as test_size  # noqa: E402

SENTENCES = ("What is the capital of France?", "Can you give me some tips on how to cook a large chicken?",
             "I am going to the store.", "Who was the first person to walk on the moon?")


def stage(name):
    return importlib.import_module(name)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "learns: trains for a minute; run with -m learns")
    config.addinivalue_line("markers", "slow: full scale, minutes; run with -m slow")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and os.environ.get("RBA_NO_SKIPS") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"skipped where skipping is not allowed: {report.longrepr}"


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        later = [item for item in items if {"slow", "learns"} & set(item.keywords)]
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


# ---------------------------------------------------------------------------------------- stages at test size
def start(script, work, *flags, processes=1, **environment):
    """A stage in a process of its own (tests/run_stage.py says what DIE_AT and the like do)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher *= processes > 1
    runner = str(Path(__file__).with_name("run_stage.py"))
    command = [sys.executable, *launcher, runner, script, "--work", str(work), *map(str, flags)]
    variables = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | variables)


def finish(process, expect=0):
    """-> stdout and stderr of a process that ended by itself."""
    out, err = process.communicate()
    assert process.returncode == expect, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-3000:]}"
    return out + err


def run_stage(script, work, *flags, **options):
    return finish(start(script, work, *flags, **options))


def die(script, work, at, *flags, **options):
    """Run a stage that kills itself in the middle of its at-th write."""
    process = start(script, work, *flags, DIE_AT=at, **options)
    out, err = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 1), (process.returncode, out[-1000:], err[-2000:])


class Killed(BaseException):
    """In the place of SIGKILL: nothing in a stage may catch it."""


def run_here(model, script, work, *flags, die_at=None, gradients=None):
    """A stage's main() in this process, on the model already loaded, which is left as it was; -> what it
    printed. die_at: Killed in the middle of that write; gradients: a file, as GRADIENTS."""
    def end():
        raise Killed
    printed, module = io.StringIO(), stage(script.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        test_size.shrink(common, module, patch.setattr)
        patch.setattr(common, "load_speechlm", lambda *_: model)
        patch.setattr(sys, "argv", [script, "--work", str(work), *map(str, flags)])
        if die_at:
            patch.setattr(os, "fsync", test_size.dying_fsync(die_at, end))
        if gradients:
            test_size.keep_gradients(common, gradients, patch.setattr)
        try:
            module.main()
        finally:
            model.zero_grad()
            model.set_state(model.initial)
    return printed.getvalue()


# --------------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="session")
def model():
    """The tiny preset's SpeechLM: real Whisper, real LLM; LoRA's B is 0. Tests leave it as it was."""
    return common.SpeechLM(common.PRESETS["tiny"])


@pytest.fixture
def restored(model):
    """The same; what is trained goes back to where it was."""
    yield model
    model.zero_grad()
    model.set_state(model.initial)


@pytest.fixture
def float32_model(restored, monkeypatch):
    """The same in float32, for what is compared digit by digit."""
    monkeypatch.setattr(common, "native_dtype", lambda: torch.float32)
    return restored if restored.llm.dtype == torch.float32 else common.SpeechLM(common.PRESETS["tiny"])


@pytest.fixture(scope="session")
def waves():
    """The sentences spoken by the embedded Piper voice, 16 kHz."""
    return [spoken(text) for text in SENTENCES]


def spoken(text, length_scale=1.0):
    import numpy as np
    import torchaudio
    from piper import PiperVoice, SynthesisConfig
    if not hasattr(spoken, "voice"):
        spoken.voice = PiperVoice.load(common.resolve("piper-joe") + "/voice.onnx")
    settings = SynthesisConfig(length_scale=length_scale, noise_scale=0.0, noise_w_scale=0.0)
    wave = np.concatenate([part.audio_float_array for part in spoken.voice.synthesize(text, settings)])
    rate = spoken.voice.config.sample_rate
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, common.RATE)


TAUGHT = (("What is the capital of France?", "It is Paris, the city of light."),
          ("How do I cook rice?", "Boil two cups of water, then add the rice."),
          ("Can you suggest a good book?", "Try Moby Dick, it is about a whale."),
          ("What should I eat for breakfast?", "Eat oats with milk and some berries."))


def write_groups(work):
    """A data set of 4 instructions in 4 voices (tempos and babble of the Piper voice), answers of at most 16
    tokens."""
    import soundfile
    (work / "data" / "audio").mkdir(parents=True)
    rows = []
    for g, (text, response) in enumerate(TAUGHT):
        for s, (tempo, snr) in enumerate(((1.0, 14), (0.85, 11), (1.15, 8), (0.75, 5))):
            wave = spoken(text, tempo)
            soundfile.write(work / "data" / "audio" / f"{g}-{s}.wav", wave.numpy(), common.RATE)
            rows.append(dict(id=f"{g}-{s}", group=f"{g}", task="instruct", language="English", text=text,
                             prompt="", opening="", response=response, reference=[response],
                             audio=f"audio/{g}-{s}.wav", voice=f"tempo-{s}", seconds=len(wave) / common.RATE,
                             condition=f"babble:{snr}"))
    for split in common.SPLITS:
        common.write_jsonl(work / "data" / f"{split}.jsonl", rows)
    config = dict(preset="tiny", teacher="smollm2-135m", served=False, language="French")
    common.write_json(work / "data" / "config.json", {"config": config})
    return work


@pytest.fixture(scope="session")
def groups(tmp_path_factory, model):
    """write_groups, already listened to, as every copy of it would be."""
    work = write_groups(tmp_path_factory.mktemp("groups") / "work")
    for split in ("train", "valid"):
        common.listen_to_split(model, work, split, common.read_items(work, split), window=12.0)
    return work


SIZES = ("--train", "instruct=2,sqa=3,s2tt=1", "--valid", "instruct=1,sqa=1",
         "--test", "instruct=2,sqa=2,s2tt=1")
TRAIN = ("--max-steps", 1, "--batch-size", 4)


@pytest.fixture(scope="session")
def work(tmp_path_factory, model):
    """One end-to-end run of the four scripts at the smallest size."""
    folder = tmp_path_factory.mktemp("run") / "work"
    run_stage("01_synthesize.py", folder, *SIZES)
    for script, flags in (("02_sft_warmup.py", TRAIN), ("03_rba_rl.py", TRAIN), ("04_evaluate.py", ())):
        run_here(model, script, folder, *flags)
    return folder


def log_of(work, name):
    """A run's log without its clock."""
    rows = [json.loads(line) for line in (work / "logs" / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(autouse=True)
def gradients_on():
    """A test that fails inside no_grad must not switch gradients off for the next."""
    torch.set_grad_enabled(True)
