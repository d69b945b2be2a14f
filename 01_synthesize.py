"""Stage 1: a teacher writes instructions and answers by itself, and several voices speak each instruction.

The paper's self-synthesis of data (arXiv 2509.03526): no human words, recordings or labels, but --s2tt's.
1. [paper] The teacher gets its chat template up to the user's words and writes the words x itself (Magpie,
   arXiv 2406.08464), at T = 1. [ours] top-p 0.9 for the embedded teacher (paper: 0.99-1.00); the template's
   own system turn, if any (paper: none). `sqa` gets a quiz turn and an opener. [paper] `s2tt` takes
   recordings and transcripts of a public set (--s2tt), not its translations; [ours] without one it gets a
   translator turn, and is written and spoken like the rest.
2. [paper] It answers x: y_ref; for `sqa` (RBA-QA) in one to five words. [ours] Greedily, under the one
   system turn that stands before every x to be answered, by teacher or student; what is asked for beside x
   (few words, a translation) is a typed request p behind it; for `sqa` the teacher says it in a sentence
   first, which then opens the answer and has to hold it.
3. [paper] What nobody would say aloud is dropped. [ours] Which filters do that; rewordings too, and what
   the teacher declines: as a voice assistant, 135M parameters are sorry in 38 % of their answers.
4. [paper] S = 4 different voices speak every instruction, one voice an `sqa`. [ours] They are Piper's and
   Kokoro's (paper: 2,456 LibriTTS voices cloned by CosyVoice); speed, pitch, filler; in `test` half of a
   group's voices, for `sqa` if a coin says so, occur in no other split; the acoustic condition in which
   training will hear the utterance. A recording has one speaker: its group is S copies of it, which stage 3
   answers S times.
5. [ours] Whisper listens: transcript and WER are columns. What no TTS should say drops the whole group.

Reads nothing. Writes DIR/data/: {train,valid,test}.jsonl, audio/ (clean), card.md, config.json, batches/.
Batches are numbered, and seeded by (seed, task, number): no kill and no number of processes changes the data.

    python 01_synthesize.py                                                    one process
    torchrun --nproc_per_node 8 01_synthesize.py --preset small --work small   one node
"""
import functools
import itertools
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import common                                             # first: it says in one line what is missing
from common import RATE, SPLITS, TASKS, UserError, derive_seed

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

FLAGS = {split: dict(help='groups a task, of which speech drops some, e.g. "instruct=24,sqa=24,s2tt=8"')
         for split in SPLITS}
FLAGS["s2tt"] = dict(metavar="KIND:PATH", help="recordings in the place of s2tt's synthesis, as published: "
                     "covost2:DIR/covost_v2.en_de.train.tsv, mustc:DIR/en-de/data/train, "
                     "fleurs:DIR/en_us/train.tsv:de_de")
CONFIG = ("preset", "seed", "teacher", "s2tt", "whisper", "voices", "unheard_voices", "voices_per_item",
          "train_conditions", "language", "instruction_tokens", "top_p", "max_new", "max_seconds", *SPLITS)
BATCH = 64                                                # user turns sampled per text batch
SPEECH_GROUPS = 8                                         # groups spoken per speech batch
GROSS_WER = 0.5                                           # above it, the voice said something else
# [ours] Bare question words, as no question, answer or entity may stand in this file.
OPENERS = ("What is the", "Who", "Which", "Where is", "What is the name of", "What", "In which country",
           "Who was the")
QUIZ = ("You are a quiz expert. The user asks a short trivia question about geography, science, history, "
        "nature or everyday things, and you answer it with one word or one name.")
# Asked for one to five words, a teacher of 135M parameters keeps to them in 5 % of its answers. Behind this
# alone it does, but 13 % of its answers to 150 public questions are right; behind its own sentence and this
# 28 %, and of those that the sentence holds 37 %.
SHORT_ANSWER = ' The answer is "'
SHORT_TOKENS = 16                                         # a teacher may write behind it
DECLINES = re.compile(r"\b(sorry|unable|assistant)\b", re.IGNORECASE)   # as SmolLM2 does
COMMON_WORDS = set(
    "a an and are can could do does for from give has have how i in is it me my of on one some tell that the "
    "there they this to was we what when where which who will with would you your".split())


# -------------------------------------------------------------------------------------------- 3: text filters
def is_speakable(text):
    """Words, and characters that can be read out: no code, markup, URL, list or line break."""
    odd = r"https?:|www\.|\.com|\(\)|--|::|\d{5}|[A-Za-z]\d|[a-z][A-Z]"
    plain = re.fullmatch(r"[A-Za-zÀ-ɏ0-9 ,.?!'’\"“”$%&:;()\-–—]+", text)
    return bool(plain and common.has_words(text) and not re.search(odd, text))


def first_failed(tests):
    """{filter: passed} -> the first filter that was not passed, or ""."""
    return next((name for name, passed in tests.items() if not passed), "")


def check_instruction(task, text, ended):
    """The filter that drops x, or ""; its form: a question for sqa, a sentence for s2tt."""
    form = {"sqa": r".*\?", "s2tt": r"[A-Z].*[.?!]", "instruct": r".*"}[task]
    return first_failed({"ended": ended, "speakable": is_speakable(text), "form": re.fullmatch(form, text),
                         "length": 3 <= len(text.split()) <= 20})


def check_answer(row, ended):
    """The filter that drops y_ref, or "". An sqa answer: one to five words, not all from the question, that
    stand so in the sentence which opened it."""
    task, answer = row["task"], row["response"]
    speakable = "\n" not in answer if task == "s2tt" else is_speakable(answer)       # s2tt: in any script
    tests = {"answer ended": ended and common.has_words(answer), "answer speakable": speakable}
    if task == "instruct":
        tests["answer declines"] = not DECLINES.search(answer)
    if task == "sqa":
        asked, said = set(common.normalise(row["text"]).split()), common.normalise(answer).split()
        sentence = row["opening"].removesuffix(SHORT_ANSWER)
        tests |= {"answer words": len(answer.split()) <= 5 and not asked.issuperset(said),
                  "answer otherwise": common.is_contained(answer, sentence)}
    return first_failed(tests)


def content_words(text):
    """What two wordings of one instruction have in common: they count as one instruction. [ours]"""
    words = re.findall(r"\w+", text.lower())
    return frozenset(words) - COMMON_WORDS or frozenset(words)


# ----------------------------------------------------------------------------- 1, 2: instructions and answers
class LocalTeacher:
    """The teacher's weights here."""

    def __init__(self, name, device):
        self.tokenizer, self.llm = common.load_llm(name, common.spread(device))

    @torch.inference_mode()
    def write(self, prompt, end_id, max_new, seeds, top_p):
        """One prompt of token ids, continued at T = 1 once for each seed -> [(text, ended)]."""
        embeds = [common.embed(self.llm, prompt)]         # (T, d)
        [samples] = common.sample(self.llm, embeds, end_id, max_new, [seeds], top_p=top_p)
        return [(self.tokenizer.decode(ids, skip_special_tokens=True), ended) for ids, ended in samples]

    def answer(self, prompts, end_id, max_new):
        """N prompts of token ids, each continued greedily -> N (text, ended)."""
        answers = common.answer_typed(self.llm, self.tokenizer, prompts, end_id, max_new)
        return [(answer.text, answer.ended) for answer in answers]


class ServedTeacher(common.Served):
    """The same behind vLLM or SGLang: /completions, as a Magpie prompt ends in the user's turn. A server's
    samples need not follow from the seed alone; the batches that are kept repeat them."""

    def __init__(self, spec):
        from transformers import AutoTokenizer
        super().__init__(spec)
        with common.loading(self.model, "tokenizer") as path:
            self.tokenizer = common.checked(AutoTokenizer.from_pretrained(path), self.model)

    def ask(self, prompt, end_id, max_new, temperature=0.0, top_p=1.0, seed=0):
        """One continuation of a prompt of token ids: (text, ended)."""
        def pick(reply):
            return str(reply["choices"][0]["text"]), reply["choices"][0]["finish_reason"] == "stop"
        # top_k and repetition_penalty: otherwise servers take what generation_config.json says
        return self.call("completions", pick, model=self.model, prompt=prompt, max_tokens=max_new, top_k=-1,
                         temperature=temperature, top_p=top_p, seed=seed % 2 ** 31, repetition_penalty=1.0,
                         stop=[self.tokenizer.decode([end_id])], stop_token_ids=[end_id])

    def write(self, prompt, end_id, max_new, seeds, top_p):
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(lambda seed: self.ask(prompt, end_id, max_new, 1.0, top_p, seed), seeds))

    def answer(self, prompts, end_id, max_new):
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(lambda prompt: self.ask(prompt, end_id, max_new), prompts))


@functools.cache
def load_teacher(name, device):
    """Cached, like load_asr and load_voice: called wherever it is needed, loaded at the first time."""
    return ServedTeacher(name) if "://" in name else LocalTeacher(name, device)


load_asr = functools.cache(common.load_whisper)


def write_instructions(teacher, task, batch, args):
    """One batch of user turns -> rows: id, task, text (x), opening, response, dropped (the filter or "")."""
    system, opener = None, ""                             # None: the template's own system turn, if any
    if task == "sqa":
        system, opener = QUIZ, OPENERS[batch % len(OPENERS)]
    if task == "s2tt":
        system = f"You translate everyday English sentences into {args.language}."
        opener = f'Translate this sentence into {args.language}: "'
    before, _, end_id = common.chat_parts(teacher.tokenizer, system=system)
    prompt = before + teacher.tokenizer(opener, add_special_tokens=False).input_ids
    seeds = [derive_seed(args.seed, task, batch, number) for number in range(BATCH)]
    rows = []
    for reply, ended in teacher.write(prompt, end_id, args.instruction_tokens, seeds, args.top_p):
        text = opener + reply
        if task == "s2tt":                                # x is what stands between the quotation marks
            text, quote, _ = reply.partition('"')
            ended = bool(quote)
        rows.append(dict(id=f"{task}-{batch:04d}-{len(rows):03d}", task=task, text=text.strip(), opening="",
                         response="", dropped=check_instruction(task, text.strip(), ended)))
    return rows


@functools.cache
def recordings(spec, seed):
    """--s2tt KIND:PATH -> its items in an order of the seed's own: number in the set, text, audio, language
    and, of a long recording, offset and duration."""
    kind, _, path = spec.partition(":")
    try:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        items = list(common.TRANSLATIONS[kind](Path(path)))
        if not items:
            raise ValueError("no rows")
        for number, item in enumerate(items):
            item |= dict(number=number, audio=str((folder / item["audio"]).resolve()))
        return random.Random(derive_seed(seed, "recordings")).sample(items, len(items))
    except Exception as error:                            # csv and yaml have errors of their own
        raise UserError(f"--s2tt {spec}: not as published ({type(error).__name__}: {str(error)[:100]}); give "
                        f"KIND:PATH, KIND one of {', '.join(common.TRANSLATIONS)}") from None


def recorded_instructions(batch, args):
    """As write_instructions, of the transcripts of recordings; none behind the last of them."""
    rows = []
    for item in recordings(args.s2tt, args.seed)[batch * BATCH:(batch + 1) * BATCH]:
        recording = dict(path=item["audio"], offset=item.get("offset", 0.0), duration=item.get("duration"))
        try:
            seconds = len(common.read_audio(**recording)) / RATE
            dropped = first_failed({"speakable": common.has_words(item["text"]),
                                    "too long to hear": seconds <= args.max_seconds})
        except UserError:                                 # gone, silent, over 30 s
            dropped = "no recording"
        rows.append(dict(id=f"s2tt-{item['number']:06d}", task="s2tt", text=item["text"], opening="",
                         response="", recording=recording, dropped=dropped))
    return rows


def short_answer(reply):
    """What the teacher wrote behind SHORT_ANSWER -> (answer, ended). A bare name with a capital and no full
    stop, as it is no sentence: the student is to learn the answer, not two ways to write it."""
    name, quote, _ = reply.partition('"')
    name = name.strip(" .,;:!?")
    return name[:1].upper() + name[1:], bool(quote)


def answer_instructions(teacher, task, rows, args):
    """Fill in y_ref and what opened it, in place, where x passed its filters."""
    typed = common.REQUESTS[task].format(language=args.language)                           # p
    end_id, max_new = common.chat_parts(teacher.tokenizer)[2], args.max_new
    asked = [row for row in rows if not row["dropped"]]
    if task == "sqa":                                     # in a sentence first, without p
        prompts = [common.text_ids(teacher.tokenizer, row["text"], "") for row in asked]
        for row, (sentence, _) in zip(asked, teacher.answer(prompts, end_id, max_new)):
            row["opening"] = sentence.strip() + SHORT_ANSWER
        max_new = SHORT_TOKENS
    prompts = [common.text_ids(teacher.tokenizer, row["text"], typed, row["opening"]) for row in asked]
    for row, (reply, ended) in zip(asked, teacher.answer(prompts, end_id, max_new)):
        answer, ended = short_answer(reply) if task == "sqa" else (reply.strip(), ended)
        row["response"] = answer
        row["dropped"] = check_answer(row, ended)


def batch_path(args, name, batch):
    return args.work / "data" / "batches" / f"{name}-{batch:04d}.jsonl"


def text_batch(task, batch, args):
    """Rows of one text batch, written once and kept."""
    path = batch_path(args, task, batch)
    if not path.exists():
        teacher = load_teacher(args.teacher, args.device)
        if task == "s2tt" and args.s2tt != "none":
            rows = recorded_instructions(batch, args)
        else:
            rows = write_instructions(teacher, task, batch, args)
        answer_instructions(teacher, task, rows, args)
        common.write_jsonl(path, rows)
    return common.read_jsonl(path)


def text_batches(task, args):
    """Batch after batch without end, W at a time, one by each of the W processes: lists of rows."""
    for first in itertools.count(0, common.world()):
        numbers = range(first, first + common.world())
        yield from common.shared(numbers, lambda batch: [text_batch(task, batch, args)])


def write_texts(task, wanted, known, args):
    """Batch after batch of a task, until `wanted` rows are not dropped -> all rows of these batches. Every
    process reads the same batches, so all stop at the same one. known: the content words of every task's
    rows so far; a rewording of one is dropped, as it might come into another split."""
    rows, kept, read, batches = [], 0, 0, text_batches(task, args)
    bar = tqdm(desc=f"write {task}", unit="group", total=wanted, disable=common.rank() > 0)
    while kept < wanted:
        batch = next(batches)
        for row in batch:
            words = content_words(row["text"])
            if not row["dropped"] and words in known:
                row["dropped"] = "duplicate"
            if not row["dropped"]:
                known.add(words)
                kept += 1
                bar.update()
            rows.append(row)
        read += 1
        if not batch or read > kept + 20:                 # under one usable turn a batch
            raise UserError(f"{task}: {read} batches hold {kept} turns that can be used, not {wanted}; give "
                            "another --teacher or --s2tt, or ask for fewer")
    bar.close()
    return rows


# -------------------------------------------------------------------------------------------------- 4: groups
def assign_splits(rows, counts, seed):
    """Rows -> {split: rows} by counts {split: {task: groups}}. A group is in one split; a split, and any
    prefix of it, mixes its tasks."""
    splits = {split: [] for split in SPLITS}
    chooser = random.Random(derive_seed(seed, "splits"))
    for task in TASKS:
        left = [row for row in rows if row["task"] == task and not row["dropped"]]
        chooser.shuffle(left)
        for split in reversed(SPLITS):
            splits[split] += left[:counts[split][task]]
            left = left[counts[split][task]:]
    for split in SPLITS:
        chooser.shuffle(splits[split])
    return splits


def choose_voices(voices, unheard, split, task, count, seed):
    """`count` different voices of a group, for sqa one. In test half of them, or of the sqa, are unheard."""
    rng = random.Random(seed)
    new = count // 2
    if task == "sqa":
        count, new = 1, rng.randrange(2)
    new = min(new, len(unheard)) if split == "test" else 0
    return rng.sample(unheard, new) + rng.sample(voices, count - new)


def utterances_of(row, split, voices, unheard, args):
    """A row -> the utterances x^(s) of its group, as train.jsonl has them, still without speech."""
    group, task, items = row["id"], row["task"], []
    seed = derive_seed(args.seed, group, "voices")
    chosen = ["recording"] * args.voices_per_item         # one speaker, answered S times by stage 3
    if "recording" not in row:
        chosen = choose_voices(voices, unheard, split, task, args.voices_per_item, seed)
    for s, voice in enumerate(chosen):
        item = dict(
            id=f"{group}-{s}", group=group, split=split, task=task,
            language=args.language if task == "s2tt" else "English",
            text=row["text"], prompt=common.REQUESTS[task].format(language=args.language),
            opening=row["opening"], response=row["response"], reference=[row["response"]],
            audio=f"audio/{group}-{s}.wav", voice=voice, seed=derive_seed(args.seed, group, s))
        item |= draw_delivery(item, args.train_conditions)
        if "recording" in row:
            item |= dict(recording=row["recording"], spoken=item["text"], speed=1.0, pitch=1.0)
        items.append(item)
    return items


def draw_delivery(item, conditions):
    """How an utterance is spoken, and where training hears it, from its own seed: `spoken`, x perhaps with a
    pause or filler, which x itself has not; `speed` and `pitch`, factors; `condition`, acoustic."""
    rng = random.Random(item["seed"])
    words, condition = item["text"].split(), rng.choice(conditions.split(","))
    if rng.random() < 0.2 and len(words) > 3:
        at = rng.randrange(1, len(words) - 1)
        words[at] = words[at].rstrip(",") + rng.choice((",", ", um,", ", uh,"))
    if bounds := re.fullmatch(r"(.+):(-?[\d.]+)-(-?[\d.]+)", condition):                   # babble:4-14
        condition = f"{bounds[1]}:{rng.uniform(float(bounds[2]), float(bounds[3])):.2f}"
    return dict(spoken=" ".join(words), speed=round(rng.uniform(0.85, 1.25), 3),
                pitch=round(2 ** (rng.uniform(-2, 2) / 12), 3),
                condition="clean" if item["split"] == "test" else condition)


# -------------------------------------------------------------------------------------------------- 4: speech
def onnx_session(path):
    """One thread: with more, Piper's samples depend on their number. Utterances run side by side instead."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Piper:
    """A Piper voice of one or many speakers, its noise off."""

    def __init__(self, path):
        from piper import PiperConfig, PiperVoice
        config = PiperConfig.from_dict(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))
        self.voice, self.rate = PiperVoice(config=config, session=onnx_session(path)), config.sample_rate

    def pronounce(self, text):
        return self.voice.phonemize(text)                 # a list of phonemes for each sentence

    def say(self, sentences, speaker, speed):
        from piper import SynthesisConfig
        config = SynthesisConfig(int(speaker or 0), 1 / speed, noise_scale=0.0, noise_w_scale=0.0)
        ids = map(self.voice.phonemes_to_ids, sentences)
        return np.concatenate([self.voice.phoneme_ids_to_audio(sentence, config) for sentence in ids])


class Kokoro:
    """Kokoro, whose styles are the speakers; it has no noise."""
    rate = 24_000

    def __init__(self, folder):
        import kokoro_onnx
        session = onnx_session(f"{folder}/kokoro.onnx")
        self.model = kokoro_onnx.Kokoro.from_session(session, f"{folder}/voices.npz")

    def pronounce(self, text):
        return self.model.tokenizer.phonemize(text, "en-us")

    def say(self, phonemes, style, speed):
        return self.model.create(phonemes, voice=style, speed=speed, is_phonemes=True)[0]


def voice_names(spec):
    """Comma list -> names of voices: `piper-joe` and `kokoro-STYLE` (embedded), PATH.onnx (a Piper voice),
    PATH.onnx#7 or PATH.onnx#0-903 (speakers of one), DIR (every voice in it). UserError for anything else."""
    embedded, names = ["piper-joe"], []
    if "kokoro-" in spec:
        embedded += [f"kokoro-{style}" for style in np.load(f"{common.resolve('kokoro')}/voices.npz").files]
    for entry in filter(None, spec.split(",")):
        path, speaker, last = re.fullmatch(r"(.*?)(?:#(\d+)(?:-(\d+))?)?", entry).groups()
        config, known, first = Path(f"{path}.json"), 0, int(speaker or 0)
        if config.is_file():
            known = json.loads(config.read_text(encoding="utf-8"))["num_speakers"]
        speakers, folder = range(first, int(last or first) + 1), sorted(Path(entry).glob("*.onnx"))
        if entry not in embedded and not folder and speakers.stop > known:
            raise UserError(f"voice {entry}: neither {', '.join(embedded)}, nor Piper's PATH.onnx with "
                            f"PATH.onnx.json beside it, PATH.onnx#0-903 of its {known} speakers, a folder")
        names += [f"{path}#{number}" for number in speakers] if speaker else map(str, folder or [entry])
    return names


@functools.cache
def load_voice(name):
    """An embedded voice or a Piper file -> its model."""
    with common.loading(name, "voice") as path:
        if name == "kokoro":
            return Kokoro(path)
        return Piper(path if path.endswith(".onnx") else f"{path}/voice.onnx")


def speak(items, threads=1):
    """N items -> N waves (samples,) float32 at 16 kHz, peak 0.9. Pitch r at speed v: spoken at v / r and
    resampled by r."""
    spoken, waves = [], []
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            if item["voice"] == "recording":
                spoken.append((pool.submit(common.read_audio, **item["recording"]), RATE))
                continue
            key, _, speaker = item["voice"].partition("-" if item["voice"].startswith("kokoro-") else "#")
            voice = load_voice(key)
            phonemes = voice.pronounce(item["spoken"])    # espeak allows one thread at a time, a network many
            wave = pool.submit(voice.say, phonemes, speaker, item["speed"] / item["pitch"])
            rate = int(voice.rate * item["pitch"]) // 50 * 50       # divisors shared with 16 kHz make it fast
            spoken.append((wave, rate))
    for wave, rate in spoken:
        samples = torch.from_numpy(np.asarray(wave.result(), np.float32))
        wave = torchaudio.functional.resample(samples, rate, RATE)
        waves.append(0.9 * wave / wave.abs().max().clamp(min=1e-6))
    return waves


def spoken_batch(batch, groups, args):
    """The utterances of a batch of groups, spoken into wav files and heard by Whisper once, and kept."""
    path = batch_path(args, "speech", batch)
    if path.exists():
        return common.read_jsonl(path)
    items = list(itertools.chain(*groups[batch * SPEECH_GROUPS:(batch + 1) * SPEECH_GROUPS]))
    waves = []                                            # as training hears them: in 16 bits
    for item, wave in zip(items, speak(items, max(1, os.cpu_count() // common.world()))):
        wav = args.work / "data" / item["audio"]
        write = functools.partial(soundfile.write, data=wave.numpy(), samplerate=RATE, format="WAV")
        common.write_atomic(wav, write)
        waves.append(torch.from_numpy(soundfile.read(wav, dtype="float32")[0]))
    transcripts = common.listen(load_asr(args.whisper, args.device), waves, args.window)
    for item, wave, transcript in zip(items, waves, transcripts):
        errors, words = common.word_errors(item["text"], transcript)
        item |= dict(seconds=round(len(wave) / RATE, 3), transcript=transcript, wer=round(errors / words, 4))
    common.write_jsonl(path, items)                       # after its wavs: where it stands, they do
    return items


# ------------------------------------------------------------------------------------ 5: splits and data card
def failed_groups(items, max_seconds):
    """{group: filter} of the groups that one of their utterances, as it was spoken, drops."""
    failed = {}
    for item in items:
        if item["seconds"] > max_seconds:
            failed[item["group"]] = "too long to hear"
        elif item["wer"] > GROSS_WER and item["voice"] != "recording":     # perhaps of another language
            failed[item["group"]] = "gross WER"
    return failed


def data_card(splits, rows, args):
    """data/card.md: what to know before training on these files."""
    people = "" if args.s2tt == "none" else f", but what `{args.s2tt}` holds of s2tt"
    card = (f"# Data card\n\nWritten by 01_synthesize.py: preset `{args.preset}`, seed {args.seed}, teacher "
            f"`{args.teacher}`. Nothing here was written, spoken or checked by a person{people}.\n\n"
            "| split | task | groups | utterances | hours | WER, clean | groups whose transcripts agree |\n"
            "|---|---|---|---|---|---|---|\n")
    for split, task in itertools.product(SPLITS, TASKS):
        items, heard = [item for item in splits[split] if item["task"] == task], defaultdict(set)
        for item in items:                                # group -> what Whisper heard in its voices
            heard[item["group"]].add(common.normalise(item["transcript"]))
        if not items:
            continue
        agreeing = sum(len(transcripts) == 1 for transcripts in heard.values())
        several = task != "sqa" and len({item["voice"] for item in items}) > 1
        share = f"{agreeing / len(heard):.0%}" if several else "one voice"
        hours = sum(item["seconds"] for item in items) / 3600
        wer = fmean(item["wer"] for item in items)
        card += f"| {split} | {task} | {len(heard)} | {len(items)} | {hours:.3f} | {wer:.3f} | {share} |\n"

    turns = defaultdict(Counter)                          # first filter failed -> task -> user turns
    for row in rows:
        turns[row["dropped"] or "none, needed or not"][row["task"]] += 1
    card += f"\n| first filter failed | {' | '.join(TASKS)} |\n|---|---|---|---|\n"
    for failed, number in sorted(turns.items()):
        card += f"| {failed} | {number['instruct']} | {number['sqa']} | {number['s2tt']} |\n"

    card += "\nTen utterances of train:\n\n"
    for item in random.Random(args.seed).sample(splits["train"], min(10, len(splits["train"]))):
        card += f"- `{item['id']}` ({item['voice']}): {item['text']} → {item['response']}\n"
    return card


# ------------------------------------------------------------------------------------------------------- main
def parse_counts(text):
    """"instruct=24,sqa=8" -> {"instruct": 24, "sqa": 8}, else 0. UserError for another task or no number."""
    counts = Counter()
    for entry in text.split(","):
        task, _, number = entry.partition("=")
        if task not in TASKS or not number.isdecimal():
            raise UserError(f"{entry} is not TASK=NUMBER with TASK one of {', '.join(TASKS)}")
        counts[task] = int(number)
    return counts


def read_voices(args):
    """-> voices of every split, voices of test alone."""
    unheard = list(dict.fromkeys(voice_names(args.unheard_voices)))
    voices = [name for name in dict.fromkeys(voice_names(args.voices)) if name not in unheard]
    if len(voices) < args.voices_per_item:
        raise UserError(f"voices {args.voices}: a group takes {args.voices_per_item} different ones that are "
                        "not in unheard_voices; name more")
    return voices, unheard


def main():
    args = common.parse_args(__doc__, FLAGS)
    counts = {split: parse_counts(getattr(args, split)) for split in SPLITS}
    asked, voices, unheard = sum(counts.values(), Counter()), [], []
    if args.s2tt == "none" or asked["instruct"] + asked["sqa"]:   # recordings alone need no voices
        voices, unheard = read_voices(args)
    args.device, data = common.setup_processes(), args.work / "data"
    if args.s2tt != "none":
        if not asked["s2tt"]:
            raise UserError("--s2tt: no split asks for s2tt; name all tasks in --train, --valid, --test")
        args.language = common.language_name(recordings(args.s2tt, args.seed)[0]["language"])
    if "://" in args.teacher and "#" not in args.teacher:     # the server's only model
        args.teacher = load_teacher(args.teacher, args.device).name
    if not (data / "config.json").exists():               # what can't be loaded leaves no configuration
        load_teacher(args.teacher, args.device)
        load_asr(args.whisper, args.device)
    config = {key: getattr(args, key) for key in CONFIG}
    config |= dict(teacher=args.teacher.rpartition("#")[2],     # a server may move
                   served="://" in args.teacher)
    common.record_config(data / "config.json", config)

    # ---- 1, 2, 3: instructions, answers, filters
    rows, known = [], set()
    for task in TASKS:
        rows += write_texts(task, asked[task], known, args)
    # ---- 4: groups of voices, speech
    groups = []
    for split, chosen in assign_splits(rows, counts, args.seed).items():
        groups += [utterances_of(row, split, voices, unheard, args) for row in chosen]
    batches = range(math.ceil(len(groups) / SPEECH_GROUPS))
    spoken = common.shared(batches, lambda batch: spoken_batch(batch, groups, args), desc="speak")
    if common.rank() > 0:
        return
    # ---- 5: what was spoken well, and its card
    failed, splits = failed_groups(spoken, args.max_seconds), {}
    for split in SPLITS:
        splits[split] = [item for item in spoken if item["split"] == split and item["group"] not in failed]
        common.write_jsonl(data / f"{split}.jsonl", splits[split])
    for row in rows:
        row["dropped"] = row["dropped"] or failed.get(row["id"], "")
    card = data_card(splits, rows, args)
    common.write_text(data / "card.md", card)
    print(card)


if __name__ == "__main__":
    common.run(main)
