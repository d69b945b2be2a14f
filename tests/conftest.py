"""Real embedded models, loaded once a session; a skipped test counts as failed in CI unless it needs a GPU."""
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def stage(name):
    return importlib.import_module(name)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and os.environ.get("RBA_NO_SKIPS") and "gpu" not in item.keywords:
        report.outcome, report.longrepr = "failed", f"skipped where skipping is not allowed: {report.longrepr}"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "slow: full scale, minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def model():
    """The tiny preset's SpeechLM in float32, so that results can be compared to the last digits. Untrained: real Whisper,
    real LLM; W and LoRA's B are 0."""
    return common.SpeechLM(common.PRESETS["tiny"], dtype=torch.float32)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """One end-to-end run of the four scripts at the smallest size."""
    from kill import DATA, finish, start
    folder = tmp_path_factory.mktemp("run") / "work"

    def run(script, *flags, **environment):
        return finish(start(script, folder, flags, **environment))[0]
    run("01_synthesize.py", *DATA)
    run("02_sft_warmup.py", *TRAIN)
    rba = start("03_rba_rl.py", folder, ["--max-steps", 2, "--batch-size", 2, "--k", 2, "--out", "rba"])     # beside the next
    run("03_rba_rl.py", *BOTH, FLOAT32=1, ROLLOUTS=folder / "rba+opd.rollouts", GRADIENTS=folder / "rba+opd.gradients")
    finish(rba)
    (folder / "stdout.txt").write_text(run("04_evaluate.py", *SYSTEMS))
    return folder


TRAIN = ("--max-steps", 2, "--batch-size", 4)
BOTH = ("--max-steps", 1, "--batch-size", 2, "--k", 2, "--baseline", "greedy", "--token-reward", 0.1, "--rewards", "semantic=1,logp=0.5")
SYSTEMS = ("--systems", "text,sft,rba,rba+opd")
SENTENCES = ("What is the capital of France?", "Can you give me some tips on how to cook a large chicken?",
             "I am going to the store.", "Who was the first person to walk on the moon?")


@pytest.fixture(scope="session")
def waves():
    """The sentences spoken by the embedded Piper voice, 16 kHz."""
    import numpy as np
    import torchaudio
    voices = stage("01_synthesize").Voices("piper-joe")
    spoken = [voices.say("piper-joe", text, 1.0) for text in SENTENCES]
    return [torchaudio.functional.resample(torch.from_numpy(np.asarray(wave)), rate, common.RATE) for wave, rate in spoken]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """`transformers serve` of the embedded LLM: (URL, model). pip install 'transformers[serving]' first."""
    import socket
    import subprocess
    import time
    import urllib.request
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, log = common.resolve("smollm2-135m"), tmp_path_factory.mktemp("served") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port), name]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", name
    finally:
        process.terminate()
        process.wait()
