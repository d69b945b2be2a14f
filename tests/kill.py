"""Kill every stage at random times and in the middle of its writes; compare the result with an undisturbed run.

    python tests/kill.py --kills 20 [--out table.md]       all four stages, an hour and a half on two cores
    python tests/kill.py stage 01_synthesize.py FLAGS     one stage at test size; environment DIE_AT=7 (of rank DIE_RANK):
                                                           SIGKILL half way through its seventh write

test_robustness.py runs a short form of it, conftest.py its stages.
"""
import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "rollout_seconds", "update_seconds", "tokens_per_second")   # of a log row: the only things that may differ
TEST_SIZES = {"BATCH": 40, "SPEECH_BATCH": 8, "SAVE_EVERY": 2}
DATA = ["--n-train", "12", "--n-valid", "3", "--n-test", "6"]
STAGES = {                                                # script: flags, what it writes
    "01_synthesize.py": (["--n-train", "6", "--n-valid", "3", "--n-test", "3"], ["data"]),   # the others work on DATA
    "02_sft_warmup.py": (["--objective", "sft", "--max-steps", "6", "--batch-size", "4"], ["sft.pt", "sft.best.pt", "logs/sft.jsonl", "heard"]),
    "03_rba_rl.py": (["--max-steps", "4", "--batch-size", "2", "--k", "2", "--out", "rba"], ["rba.pt", "logs/rba.jsonl", "plots/rba.png"]),
    "04_evaluate.py": (["--systems", "text,cascade,sft,rba"], ["answers", "results.json", "results.md", "results.png"])}


# ------------------------------------------------------------------------------------------- one stage, test size
def run_stage(script, flags):
    """The script's main() with batches small enough for a test, and death at the write that DIE_AT names."""
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *flags]
    common, stage = importlib.import_module("common"), importlib.import_module(script.removesuffix(".py"))
    common.PRESETS["tiny"] |= json.loads(os.environ.get("PRESET", '{"max_new": 40}'))      # sampling is two thirds of a test's time
    for name, size in TEST_SIZES.items():
        if hasattr(stage, name):
            setattr(stage, name, size)
    writes, fsync = [], os.fsync

    def dies(fd):
        """In the place of os.fsync: it comes after the bytes were written and before the file has its name."""
        writes.append(fd)
        if len(writes) == int(os.environ["DIE_AT"]):
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path.is_file():                            # half of a new file, or half of the line just appended
                data = path.read_bytes()
                start = 0 if path.suffix == ".rba-tmp" else data[:-1].rfind(b"\n") + 1
                os.truncate(path, (start + len(data)) // 2)
            if "DIED" in os.environ:
                Path(os.environ["DIED"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)
    if "FLOAT32" in os.environ:
        import torch
        common.native_dtype = lambda: torch.float32
    if "ROLLOUTS" in os.environ:
        same_rollouts(stage, Path(os.environ["ROLLOUTS"]))
    if "GRADIENTS" in os.environ:
        keep_gradients(common, os.environ["GRADIENTS"])
    if "DIE_AT" in os.environ and os.environ.get("RANK", "0") == os.environ.get("DIE_RANK", "0"):
        os.fsync = dies
    common.run(stage.main)


def same_rollouts(stage, path):
    """The first run keeps its rollouts in `path`, the next one takes them from there: sampling may part by rounding."""
    rollout = stage.rollout

    def kept(model, items, *args):
        held = json.loads(path.read_text()) if path.exists() else {}
        if not held:
            samples, greedy = rollout(model, items, *args)
            held = {item["id"]: both for item, *both in zip(items, samples, greedy)}
            path.write_text(json.dumps(held))
        return [held[item["id"]][0] for item in items], [held[item["id"]][1] for item in items]
    stage.rollout = kept


def keep_gradients(common, path):
    """The first update's gradients, summed over the processes, in `path`."""
    import torch
    add = common.sum_gradients

    def kept(parameters):
        add(parameters)
        if not os.path.exists(path) and os.environ.get("RANK", "0") == "0":
            torch.save([p.grad.clone() for p in parameters], path)
    common.sum_gradients = kept


def start(script, work, flags, processes=1, **environment):
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "stage", script, "--work", str(work), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {name: str(value) for name, value in environment.items()})


def finish(process, expect=0):
    """-> (stdout, stderr) of a process that ended by itself."""
    out, err = process.communicate()
    assert process.returncode == expect, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-3000:]}"
    return out, err


def kill(process, after):
    """SIGKILL to the process and its children after so many seconds; False if it had ended before."""
    try:
        process.communicate(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


# ------------------------------------------------------------------------------------------------ comparison
def content(path):
    if path.suffix == ".jsonl" and path.parent.name == "logs":
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]
    return path.read_bytes()


def differences(whole, work, outputs):
    """Names of files below `outputs` that are not the same in both directories; what a kill left behind among them."""
    def files(folder):
        found = [p for output in outputs for p in ([folder / output] if (folder / output).is_file() else (folder / output).rglob("*"))]
        return {p.relative_to(folder): p for p in found if p.is_file() and p.suffix != ".lock"}
    a, b = files(whole), files(work)
    left = [p.name for p in work.rglob("*") if p.suffix == ".rba-tmp" or p.name.endswith((".resume.pt", ".parts"))]
    return sorted(str(p) for p in a.keys() | b.keys() if p not in a or p not in b or content(a[p]) != content(b[p])) + left


# ------------------------------------------------------------------------------------------------- the kill table
def link_tree(source, target):
    """A copy by hard links: the stages replace files and never write into them, logs apart, which are copied."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.lock"), copy_function=lambda a, b: shutil.copy2(a, b) if "logs" in Path(a).parts else os.link(a, b))


def main(kills, out, seed=0):
    rng, rows = random.Random(seed), []
    folder = Path(tempfile.mkdtemp(prefix="rba-kill-"))
    whole, before = folder / "whole", folder / "before"   # the undisturbed run; what stood there before the stage
    whole.mkdir()
    for script, (flags, outputs) in STAGES.items():
        if script.startswith("02"):
            shutil.rmtree(whole)
            finish(start("01_synthesize.py", whole, DATA))
        link_tree(whole, before)
        started = time.time()
        finish(start(script, whole, flags))
        seconds, done, mid, complete, wrong, round_ = time.time() - started, 0, 0, 0, [], 0
        while done < kills:                               # rounds: kills until the stage is complete, then compare
            work, round_ = folder / f"killed{round_}", round_ + 1
            link_tree(before, work)
            while True:
                if done == kills:
                    finish(start(script, work, flags))
                    break
                if rng.random() < 0.5:                    # half of the kills in the middle of a write
                    process = start(script, work, flags, DIE_AT=rng.randrange(1, 15))
                    killed = bool(process.communicate()) and process.returncode == -signal.SIGKILL
                    mid += killed
                else:
                    killed = kill(start(script, work, flags), rng.uniform(3, 0.8 * seconds))
                done += killed
                if not killed:
                    break
            complete += 1
            wrong += differences(whole, work, outputs)
            print(f"{script}: {done} kills ({mid} in a write), {complete} runs completed, differences: {wrong or 'none'}", flush=True)
            shutil.rmtree(work)
        rows.append(f"| {script} | {seconds:.0f} | {done} | {mid} | {complete} | {', '.join(wrong) or 'none'} |")
        shutil.rmtree(before)
    shutil.rmtree(folder)
    table = "\n".join(["| stage | seconds undisturbed | kills | of them in a write | runs completed after them | files that differ |", "|---" * 6 + "|",
                       *rows])
    print(table)
    if out:
        Path(out).write_text(table + "\n")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["stage"]:
        run_stage(sys.argv[2], sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        parser.add_argument("--kills", type=int, default=20, help="per stage")
        parser.add_argument("--out", help="file for the table")
        args = parser.parse_args()
        main(args.kills, args.out)
