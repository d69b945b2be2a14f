"""A stage at test size, in a process of its own: python tests/run_stage.py SCRIPT FLAGS

DIE_AT=7 (in process DIE_RANK, default 0): SIGKILL in the middle of the seventh write. GRADIENTS=FILE: the
first update's gradients, summed over the processes. FLOAT32=1: where two runs are compared digit by digit.
"""
import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TEST_SIZES = {"BATCH": 32, "SPEECH_GROUPS": 2, "SAMPLED": 1, "RESAMPLES": 1000}


def shrink(common, stage, put=setattr):
    """Test size: put(module, name, value) for every number of it."""
    tiny = common.PRESETS["tiny"] | dict(voices_per_item=2, max_new=24, held_out=2, curve_points=1,
                                         save_every=2, voices="piper-joe,kokoro-jf_alpha",
                                         unheard_voices="kokoro-jf_nezumi")
    put(common, "PRESETS", common.PRESETS | {"tiny": tiny})
    for name, size in TEST_SIZES.items():
        if hasattr(stage, name):
            put(stage, name, size)


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_fsync(number, end=sigkill):
    """In the place of os.fsync: it comes after the bytes were written and before the file has its name. The
    number-th call leaves half of a new file, or of the line just appended, and ends the process."""
    fsync, writes = os.fsync, []

    def dies(fd):
        writes.append(fd)
        if len(writes) == number:
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            data = path.read_bytes()
            start = 0 if path.suffix == ".tmp" else data[:-1].rfind(b"\n") + 1
            os.truncate(path, (start + len(data)) // 2)
            end()
        fsync(fd)
    return dies


def keep_gradients(common, path, put=setattr):
    import torch
    clip = torch.nn.utils.clip_grad_norm_

    def kept(parameters, norm):
        parameters = list(parameters)
        if not os.path.exists(path) and common.rank() == 0:
            torch.save([p.grad.clone() for p in parameters], path)
        return clip(parameters, norm)
    put(common.nn.utils, "clip_grad_norm_", kept)


def main():
    script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    common, stage = importlib.import_module("common"), importlib.import_module(script.removesuffix(".py"))
    shrink(common, stage)
    if "FLOAT32" in os.environ:
        import torch
        common.native_dtype = lambda: torch.float32
    if "GRADIENTS" in os.environ:
        keep_gradients(common, os.environ["GRADIENTS"])
    if "DIE_AT" in os.environ and os.environ.get("RANK", "0") == os.environ.get("DIE_RANK", "0"):
        os.fsync = dying_fsync(int(os.environ["DIE_AT"]))
    common.run(stage.main)


if __name__ == "__main__":
    main()
