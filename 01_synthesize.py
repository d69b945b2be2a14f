"""Stage 1: a teacher LLM writes instructions and answers by itself, a TTS speaks the instructions (RBA, step 1).

[paper] "self-synthesis ... extensive, high-fidelity alignment data, without human annotation".
How it is done here is [ours]:
1. Magpie (arXiv 2406.08464): the teacher gets its chat template up to the user's words and samples the user's turn
   (T = 1, no truncation). For `sqa` and `s2tt` the turn's first words are given, with T = 0.8.
2. The teacher answers greedily under the one system turn; for `sqa` it then names the short answer in its own answer.
3. Text that can't be spoken, near duplicates and answers that were cut are filtered; a funnel counts all of it.
4. Speech: a voice, speed, pitch and disfluency per item, all drawn from the item's own seed. Whisper transcribes; an
   item over the WER bound leaves `train` and `valid`: the voice did not say the words. The test split stands twice:
   `test` with the bound, `test_all` without.
5. After that check, `train` and `valid` get an acoustic condition each (half of them noise, reverberation or a narrow band):
   the variable speech that alignment has to learn from. `test` stays clean, for 04 to disturb; half of it is spoken by
   voices that occur nowhere else.

Reads nothing. Writes DIR/data/: {train,valid,test,test_all}.jsonl, audio/*.wav, card.md, funnel.json, config.json.
The unit of work is a numbered batch seeded by (seed, stream, batch): kills and processes do not change the data.

    python 01_synthesize.py                                       one process
    torchrun --nproc_per_node 8 01_synthesize.py --preset small   one node
"""
import json
import math
import os
import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common                                             # first: it says in one line what is missing
from common import RATE, TASKS, UserError, derive_seed

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

FLAGS = {"n-train": dict(type=int, help="items, a third per task"), "n-valid": dict(type=int, help="likewise"),
         "n-test": dict(type=int, help="likewise")}

BATCH = 128                                               # user turns sampled per text batch
SPEECH_BATCH = 32                                         # utterances per speech batch
POOL = {"instruct": 2.0, "sqa": 1.3, "s2tt": 1.4}         # items per item wanted, for the WER bound to take its share
# What stands before the sampled words: a system turn (None: the template's own) and the turn's first words. Openers
# are bare question words: no question, answer or entity stands in this file.
QUIZ = ("You are a quiz expert. The user asks a short trivia question about geography, science, history, nature or "
        "everyday things, and you answer it with one word or one name.")
OPENERS = ("What is the", "Who", "Which", "Where is", "What is the name of", "What", "In which country", "Who was the")
TEXT_ROW = dict(id=str, task=str, text=str, response=str, reference=list, ended=bool, dropped=str)
CONDITIONS = (("clean", 3), ("noise:{:.0f}", 1, 0, 20), ("reverb:{:.2f}", 1, 0.3, 0.9), ("band:{:.0f}", 1, 700, 3000))


# ------------------------------------------------------------------------------------------------ text filters
def is_speakable(text):
    """No code, markup, URL, list, table or line break; letters and digits that can be read out, and words to count errors by."""
    return bool(re.fullmatch(r"[A-Za-z0-9 ,.?!'’\"$%&:;()\-]+", text) and common.has_words(text)) and not re.search(
        r"https?:|www\.|\.com|\(\)|--|::|\d{5}|[A-Za-z]\d|[a-z][A-Z]|[_`]", text)


def has_length(text, low=3, high=20):
    return low <= len(text.split()) <= high


def is_english(text):
    """At least a fifth of the words are common English function words: the filter against other languages and word
    salad. [ours]"""
    common_words = set("a an and are can could do does for from give has have how i in is it me my of on one some "
                       "tell that the there they this to was we what when where which who will with would you your"
                       .split())
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) > 0 and sum(word in common_words for word in words) >= len(words) / 5


class Unlike:
    """Keeps the rows that passed every filter and are no near duplicate of an earlier one: word bigrams that overlap by
    Jaccard >= threshold."""

    def __init__(self, threshold=0.7):
        self.threshold, self.holders, self.grams, self.rows = threshold, {}, [], []

    def twin(self, text):
        """Index of an earlier text that is a near duplicate, or None; the text is added if there is none."""
        words = ["<"] + re.findall(r"[a-z0-9]+", text.lower()) + [">"]
        grams = set(zip(words, words[1:]))
        # so much is shared that any few of the grams hold one that is: the rarest have the fewest texts to compare with
        few = len(grams) - math.ceil(self.threshold * len(grams) - 1e-9) + 1
        rare = sorted(grams, key=lambda gram: len(self.holders.get(gram, ())))[:few]
        for j in sorted({j for gram in rare for j in self.holders.get(gram, ())}):
            n = len(grams & self.grams[j])
            if n / (len(grams) + len(self.grams[j]) - n) >= self.threshold:
                return j
        for gram in grams:
            self.holders.setdefault(gram, []).append(len(self.grams))
        self.grams.append(grams)
        return None

    def add(self, rows):
        self.rows += [row for row in rows if not row["dropped"] and self.twin(row["text"]) is None]


def short_answer(question, answer, continuation):
    """The teacher's own naming of the key words of its answer: a run of <= 3 words of the answer that the question
    does not already hold, or ""."""
    name = re.split(r"[.,!?;\n]", continuation.strip(' :"'))[0].strip(' "\':')
    name = re.sub(r"^(in |at |by )?(the |an? )?", "", name, flags=re.I)

    def spaced(text):
        return " " + " ".join(re.findall(r"[\w'-]+", text.lower())) + " "
    good = 1 <= len(name.split()) <= 3 and len(name) > 1 and common.has_words(name) and spaced(name) in spaced(answer)
    return name if good and spaced(name) not in spaced(question) else ""


# ----------------------------------------------------------------------------------- 1, 2: instructions, answers
class ServedTeacher(common.Served):
    """The teacher behind an OpenAI-compatible URL, asked through the completions route, as a Magpie prompt ends within the user's turn.
    MODEL names its tokenizer too. A server's samples need not follow from the seed; the batches kept in data/ are what repeats them."""

    def __init__(self, spec):
        from transformers import AutoTokenizer
        super().__init__(spec)
        with common.loading(self.model, "tokenizer") as path:
            self.tokenizer = common.checked(AutoTokenizer.from_pretrained(path), self.model)
        self.dialect = "vllm"                             # how to switch top-k and the like off is no part of the standard
        try:
            self.ask("Hello", 0, 1, 0, 1.0)
        except common.Refused:
            self.dialect = "transformers"
            self.ask("Hello", 0, 1, 0, 1.0)

    def ask(self, prompt, end_id, max_new, seed, temperature):
        """-> (text, ended); seed None: greedy."""
        greedy = seed is None
        if self.dialect == "vllm":
            own = dict(top_k=-1, repetition_penalty=1.0, stop_token_ids=[end_id])
        else:
            own = dict(generation_config=json.dumps(dict(do_sample=not greedy, top_k=0, eos_token_id=end_id, pad_token_id=end_id)))
        return self.call("completions", lambda reply: (str(reply["choices"][0]["text"]), reply["choices"][0]["finish_reason"] == "stop"),
                         model=self.model, prompt=prompt, max_tokens=max_new, temperature=0.0 if greedy else temperature, top_p=1.0,
                         seed=0 if greedy else seed % 2 ** 31, **own)

    def continuations(self, prompts, end_id, max_new, seeds, temperature):
        """Token id lists -> a list of (text, ended) each: one greedy, or one for each seed."""
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        if self.tokenizer("").input_ids:                  # the server puts it before the prompt by itself
            texts = [text.removeprefix(self.tokenizer.bos_token) for text in texts]
        with ThreadPoolExecutor(32) as pool:
            waiting = [[pool.submit(self.ask, text, end_id, max_new, seed, temperature) for seed in (seeds[i] if seeds else [None])]
                       for i, text in enumerate(texts)]
            return [[future.result() for future in own] for own in waiting]


class LocalTeacher:
    """The teacher as a model of our own; weights that one GPU does not hold go over all of them, where one process runs."""

    def __init__(self, name, device, world=1):
        spread = world == 1 and torch.cuda.device_count() > 1 and (
            sum(p.numel() for p in common.blueprint(name).parameters()) * 2.2 > torch.cuda.get_device_properties(0).total_memory)
        self.tokenizer, self.llm = common.load_llm(name, device_map="auto" if spread else None)
        if not spread:
            self.llm.to(device)

    def continuations(self, prompts, end_id, max_new, seeds, temperature):
        results, table = [None] * len(prompts), self.llm.get_input_embeddings()
        for chosen in common.by_length([len(prompt) for prompt in prompts], BATCH):
            with common.autocast(self.llm), torch.inference_mode():
                embeds = [table(torch.tensor(prompts[i], device=table.weight.device)) for i in chosen]
                found = common.sample(self.llm, embeds, end_id, max_new, seeds, temperature)
            for i, replies in zip(chosen, found):
                results[i] = [(self.tokenizer.decode(ids, skip_special_tokens=True), ended) for ids, ended in replies]
        return results


def write_texts(teacher, stream, batch, args):
    """One numbered batch of a stream (a task) -> list of rows.

    A row: id, task, text, response, reference, ended, and `dropped`, the first filter it failed ("" if none).
    """
    tokenizer = teacher.tokenizer
    system, opener, temperature = None, "", 1.0
    if stream == "sqa":
        system, opener, temperature = QUIZ, OPENERS[batch % len(OPENERS)], 0.8
    if stream == "s2tt":
        system, temperature = f"You translate everyday English sentences into {args.language}.", 0.8
        opener = f'Translate this sentence into {args.language}: "'
    before, _, end_id = common.chat_parts(tokenizer, system=system)
    before = before + tokenizer(opener, add_special_tokens=False).input_ids

    def continuations(prompts, max_new, seeds=None):
        return teacher.continuations(prompts, end_id, max_new, seeds, temperature)

    seeds = [[derive_seed(args.seed, stream, batch, row) for row in range(BATCH)]]
    rows = []
    for number, (said, ended) in enumerate(continuations([before], args.instruction_tokens, seeds)[0]):
        text = said.split('"')[0].strip() if stream == "s2tt" else (opener + said).strip()
        if stream == "s2tt":
            ended = '"' in said                           # the quotation's end is the sentence's end
        checks = (("ended", ended), ("speakable", is_speakable(text)), ("length", has_length(text)),
                  ("language", is_english(text)), ("form", {"sqa": text.endswith("?"), "s2tt": text.endswith((".", "?", "!"))
                                              and text[:1].isupper()}.get(stream, True)))
        rows.append(dict(id=f"{stream}-{batch:04d}-{number:03d}", task=stream, text=text, response="", reference=[],
                         ended=False, dropped=next((name for name, passed in checks if not passed), "")))
    asked = [row for row in rows if not row["dropped"]]
    prompt = common.REQUESTS[stream].format(language=args.language)
    before, after, _ = common.chat_parts(tokenizer, prompt)
    prompts = [before + tokenizer(row["text"], add_special_tokens=False).input_ids + after for row in asked]
    for row, [(answer, ended)] in zip(asked, continuations(prompts, args.max_new)):
        row |= dict(response=answer.strip(), ended=ended, reference=[answer.strip()])
        row["dropped"] = "" if ended and common.has_words(answer) else "answer ended"
        if not row["dropped"] and stream != "s2tt" and not is_speakable(row["response"]):
            row["dropped"] = "answer speakable"
    if stream == "sqa":
        pairs = [(row, prompt) for row, prompt in zip(asked, prompts) if not row["dropped"]]
        named = continuations([prompt + tokenizer(row["response"] + " In other words, the answer is:",
                                                  add_special_tokens=False).input_ids for row, prompt in pairs], 8)
        for (row, _), [(continuation, _)] in zip(pairs, named):
            row["reference"] = [short_answer(row["text"], row["response"], continuation)]
            row["dropped"] = "" if row["reference"][0] else "short answer"
    return rows


def read_streams(args, teacher, rank, world):
    """Text batches of every task, in order, until each has what its splits need; kept in data/batches/.
    -> (all rows, the unlike ones among them).

    Where a stream stops depends on its batches alone, not on how many processes wrote them.
    """
    folder = args.work / "data" / "batches"
    rows, unlike = [], Unlike()
    for stream in TASKS:
        batch, useless, last = 0, 0, None
        wanted = math.ceil(((args.n_train + args.n_valid) * POOL[stream] + args.n_test) / len(TASKS))
        with tqdm(desc=f"write {stream}", unit="item", disable=rank > 0, total=wanted) as bar:
            while True:
                have = sum(row["task"] == stream for row in unlike.rows)
                bar.update(min(have, wanted) - bar.n)
                if have >= wanted:
                    break
                useless = useless + 1 if have == last else 0
                if useless == 20:
                    raise UserError(f"{args.teacher}: 20 batches of {stream} in a row gave no new item; the filters drop "
                                    "all of it; choose another teacher or smaller --n-train/--n-test")
                last = have
                if batch % world == 0:                    # a round: one batch per process
                    path = folder / f"{stream}-{batch + rank:04d}.jsonl"
                    if not path.exists():
                        common.write_jsonl(path, write_texts(teacher(), stream, batch + rank, args))
                    common.barrier()
                written = common.read_jsonl(folder / f"{stream}-{batch:04d}.jsonl", lambda row: common.check_fields(row, TEXT_ROW),
                                            "01_synthesize.py")
                unlike.add(written)
                rows += written
                batch += 1
    return rows, unlike.rows


def assign_splits(rows, args):
    """Unlike rows -> {split: rows}: no text, nor a near duplicate of it, stands in two splits.

    `train` and `valid` get POOL times what is wanted, for the WER bound.
    """
    chooser = random.Random(derive_seed(args.seed, "splits"))
    splits = {split: [] for split in common.SPLITS}
    for task in TASKS:
        answered = [row for row in rows if row["task"] == task]
        chooser.shuffle(answered)
        for split, wanted in (("test", args.n_test), ("valid", args.n_valid * POOL[task]), ("train", args.n_train * POOL[task])):
            share = math.ceil(wanted / len(TASKS))
            splits[split] += answered[:share]
            answered = answered[share:]
    return splits


# ----------------------------------------------------------------------------------------------- 3: speech
class Network:
    """An ONNX session of one thread, as Piper's samples depend on their number; several utterances are spoken at once instead.
    The phonemizers can't do that: `turn` is held while a voice works, and left while its network computes."""

    turn = threading.Lock()

    def __init__(self, path):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, *inputs):
        self.turn.release()
        try:
            return self.session.run(*inputs)
        finally:
            self.turn.acquire()


class Vits:
    """A multi-speaker VITS of transformers, a whole batch at once; its noise is off."""

    def __init__(self, path, device):
        import espeakng_loader
        from phonemizer.backend.espeak.wrapper import EspeakWrapper
        from transformers import VitsModel, VitsTokenizer
        EspeakWrapper.set_library(espeakng_loader.get_library_path())
        EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
        self.tokenizer, self.model = VitsTokenizer.from_pretrained(path), VitsModel.from_pretrained(path).to(device).eval()
        self.model.noise_scale = self.model.noise_scale_duration = 0.0

    @torch.inference_mode()
    def say(self, speakers, texts, speeds):
        """-> N ((samples,) float32 numpy, rate in Hz)."""
        known = self.model.config.num_speakers
        if max(speakers) >= known:
            raise UserError(f"voice #{max(speakers)}: the model has the speakers #0 to #{known - 1}")
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        hook = None
        if known > 1:                                     # it takes one speaker for the batch: the others go in where he is looked up
            ids = torch.tensor(speakers, device=self.model.device)
            hook = self.model.embed_speaker.register_forward_hook(lambda module, *_: torch.nn.functional.embedding(ids, module.weight))
        try:
            said = self.model(**inputs, speaker_id=0 if known > 1 else None, speaking_rate=torch.tensor(speeds, device=self.model.device)[:, None, None])
        finally:
            hook and hook.remove()
        return [(wave[:length].cpu().numpy(), self.model.config.sampling_rate) for wave, length in zip(said.waveform, said.sequence_lengths.tolist())]


class Voices:
    """Text -> speech of named voices: `piper-NAME`, `kokoro-STYLE`, a Piper .onnx file, or MODEL#SPEAKER of a VITS (directory or hub id).
    Deterministic: Piper's and VITS's noise is off."""

    loaded = {}                                           # engines, shared by all instances

    def __init__(self, spec, device="cpu"):
        self.weights, self.device = common.parse_voices(spec), device
        styles = np.load(f"{common.resolve('kokoro')}/voices.npz").files if "kokoro-" in spec else []
        known = [name for name in common.EMBEDDED if name.startswith("piper-")] + [f"kokoro-{style}" for style in styles]
        for name in self.weights:
            if name not in known and not Path(name).is_file() and not re.fullmatch(r".+#\d+", name):
                raise UserError(f"voice {name}: not one of {', '.join(known)}, nor a Piper .onnx file, nor MODEL#SPEAKER of a VITS")

    def say_all(self, requests, threads=1):
        """[(voice, text, speed)] -> [((samples,) float32 numpy, rate in Hz)]: a VITS's as one batch, the others `threads` at a time."""
        out = [None] * len(requests)
        for model in dict.fromkeys(voice.rpartition("#")[0] for voice, _, _ in requests if "#" in voice):
            own = [i for i, (voice, _, _) in enumerate(requests) if voice.rpartition("#")[0] == model]
            if model not in self.loaded:
                with common.loading(model, "VITS voice") as path:
                    self.loaded[model] = Vits(path, self.device)
            voices, texts, speeds = zip(*(requests[i] for i in own))
            said = self.loaded[model].say([int(voice.rpartition("#")[2]) for voice in voices], list(texts), speeds)
            for i, spoken in zip(own, said):
                out[i] = spoken
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda held, request: held or self.say(*request), out, requests))

    def say(self, voice, text, speed):
        """-> ((samples,) float32 numpy, rate in Hz) of an ONNX voice; for many threads."""
        with Network.turn:
            return self._say(voice, text, speed)

    def _say(self, voice, text, speed):
        key = "kokoro" if voice.startswith("kokoro-") else voice
        if key not in self.loaded:
            with common.loading(key, "voice") as path:
                if key == "kokoro":
                    from kokoro_onnx import Kokoro
                    self.loaded[key] = Kokoro.from_session(Network(f"{path}/kokoro.onnx"), f"{path}/voices.npz")
                else:
                    from piper import PiperConfig, PiperVoice
                    path = path if Path(path).is_file() else f"{path}/voice.onnx"
                    config = PiperConfig.from_dict(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))
                    self.loaded[key] = PiperVoice(config=config, session=Network(path))
        engine = self.loaded[key]
        if key == "kokoro":
            return engine.create(text, voice=voice.removeprefix("kokoro-"), speed=speed)
        from piper import SynthesisConfig
        quiet = SynthesisConfig(length_scale=1 / speed, noise_scale=0.0, noise_w_scale=0.0)
        return np.concatenate([c.audio_float_array for c in engine.synthesize(text, quiet)]), engine.config.sample_rate


def draw_delivery(voices, unheard, item):
    """Item -> (voice, words, speed, pitch, description: the acoustic condition, which is not applied yet, speed and pitch), all drawn
    from the item's seed. Every other test item is spoken by one of the `unheard` voices. A pause or filler is spoken, but x stays as
    the teacher wrote it."""
    rng, test = random.Random(item["seed"]), item["split"] == "test"
    if test and rng.random() < 0.5:
        voices = unheard
    voice = rng.choices([*voices.weights], [*voices.weights.values()])[0]
    speed, pitch = rng.uniform(0.85, 1.25), 2 ** (rng.uniform(-2, 2) / 12)
    kinds, weights = zip(*((c[:1] + c[2:], c[1]) for c in CONDITIONS))
    form, *bounds = rng.choices(kinds, weights)[0]
    condition = "clean" if test else form.format(rng.uniform(*bounds)) if bounds else form
    words, filler = item["text"].split(), ""
    if rng.random() < 0.2 and len(words) > 3:
        at, filler = rng.randrange(1, len(words) - 1), rng.choice((",", ", um,", ", uh,"))
        words[at] = words[at].rstrip(",") + filler
    described = f"{condition} speed:{speed:.2f} pitch:{12 * math.log2(pitch):+.1f}" + (" filler" if filler else "")
    return voice, " ".join(words), speed, pitch, described


def speak(voices, unheard, items, threads=1):
    """Items -> [(speech (samples,) at 16 kHz, voice, description)]. Pitch: spoken at speed v/r and resampled by r, so that the speed
    heard is v."""
    plans = [draw_delivery(voices, unheard, item) for item in items]
    spoken = voices.say_all([(voice, words, speed / pitch) for voice, words, speed, pitch, _ in plans], threads)
    return [(0.9 * torchaudio.functional.resample(torch.from_numpy(np.asarray(wave, np.float32)), int(rate * pitch) // 50 * 50, RATE), voice, described)
            for (voice, _, _, pitch, described), (wave, rate) in zip(plans, spoken)]


def write_speech(items, voices, unheard, asr, args, threads):
    """Speak a batch of items, let Whisper check the speech, and write it under its acoustic condition: items with audio,
    seconds, voice, perturbation, transcript and wer (both of the check)."""
    waves = []
    for item, (wave, item["voice"], item["perturbation"]) in zip(items, speak(voices, unheard, items, threads)):
        item["audio"], item["seconds"] = f"audio/{item['id']}.wav", round(len(wave) / RATE, 3)
        disturbed = common.perturb(wave, item["perturbation"].split()[0], item["seed"])
        common.write_atomic(args.work / "data" / item["audio"],
                            lambda path: soundfile.write(path, disturbed.numpy(), RATE, "PCM_16", format="WAV"))
        waves.append(wave)
    short = [i for i, item in enumerate(items) if item["seconds"] <= args.max_seconds]
    for i, heard in zip(short, common.listen(asr(), [waves[i] for i in short], args.window)):
        errors, words = common.word_errors(items[i]["text"], heard["text"])
        items[i]["transcript"], items[i]["wer"] = heard["text"], round(errors / words, 4)
    return items


def is_spoken(path, items, data):
    """Whether a speech batch is done: its file holds these items, and their audio files are whole."""
    if not path.exists():
        return False
    rows = common.read_jsonl(path, common.check_item, "01_synthesize.py")
    if [row["id"] for row in rows] != [item["id"] for item in items]:
        raise UserError(f"{path}: does not hold the items of its batch; delete it and run 01_synthesize.py again")
    sizes = [(data / row["audio"]).stat().st_size if (data / row["audio"]).is_file() else 0 for row in rows]
    return all(abs(size - 44 - 2 * row["seconds"] * RATE) < 40 for size, row in zip(sizes, rows))   # a header, 16 bits a sample


# ------------------------------------------------------------------------------------------- funnel and card
def write_card(path, splits, spoken, funnel, args):
    """data/card.md: what somebody needs to know before training on these files. Returns it without the sample rows."""
    lines = [f"# Data card\n\nWritten by 01_synthesize.py: preset `{args.preset}`, seed {args.seed}, teacher "
             f"`{args.teacher}`. Nothing here was written, spoken or checked by a person.\n",
             "| split | " + " | ".join(TASKS) + " | items | hours | words per utterance | answers | words per answer |",
             "|---" * (len(TASKS) + 6) + "|"]
    for split, rows in splits.items():
        tasks = Counter(row["task"] for row in rows)
        spoken_words = sum(len(row["text"].split()) for row in rows)
        answers = [len(row["response"].split()) for row in rows]
        lines.append(f"| {split} | " + " | ".join(str(tasks[t]) for t in TASKS) + f" | {len(rows)} | "
                     f"{sum(row['seconds'] for row in rows) / 3600:.2f} | {spoken_words / max(1, len(rows)):.1f} | {len(answers)} | "
                     f"{sum(answers) / max(1, len(answers)):.1f} |")
    lines += ["\n`test_all` is the test split before the WER bound, `test` after it.\n",
              "## Voices\n\n| voice | splits | utterances | hours | WER of Whisper on the speech itself, before the bound |",
             "|---" * 5 + "|"]
    for voice in sorted({item["voice"] for item in spoken}):
        own = [item for item in spoken if item["voice"] == voice]
        errors, words = map(sum, zip(*(common.word_errors(item["text"], item["transcript"]) for item in own)))
        where = ", ".join(split for split in common.SPLITS if any(item["split"] == split for item in own))
        lines.append(f"| {voice} | {where} | {len(own)} | {sum(i['seconds'] for i in own) / 3600:.2f} | {errors / words:.3f} |")
    lines += ["\n## Funnel\n\nSampled user turns, and what each filter in turn dropped.\n",
              "| stream | " + " | ".join(next(iter(funnel.values()))) + " |", "|---" * (1 + len(next(iter(funnel.values())))) + "|"]
    lines += [f"| {stream} | " + " | ".join(map(str, counts.values())) + " |" for stream, counts in funnel.items()]
    lines += ["\n## Ten rows\n"]
    shown = random.Random(args.seed).sample(splits["train"], min(10, len(splits["train"])))
    lines += [f"- `{r['id']}` ({r['voice']}, {r['perturbation']}): {r['text']} → {r['response']}"
              + (f" [{r['reference'][0]}]" if r["task"] == "sqa" else "") for r in shown]
    common.write_text(path, "\n".join(lines) + "\n")
    return "\n".join(lines[:lines.index("\n## Ten rows\n")])


def main():
    args = common.parse_args(__doc__, FLAGS)
    for name in ("n_train", "n_valid", "n_test"):
        if getattr(args, name) < len(TASKS):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {len(TASKS)}, one per task")
    rank, world, device = common.setup_processes()
    data = args.work / "data"
    keys = ("preset", "seed", "teacher", "whisper", "voices", "unheard_voices", "language", "instruction_tokens", "max_new", "max_seconds",
            "wer_bound", "n_train", "n_valid", "n_test")
    if common.is_url(args.teacher) and "#" not in args.teacher:
        raise UserError(f"--teacher {args.teacher}: add #MODEL, its name there, which names its tokenizer too")
    address, args.teacher = args.teacher, args.teacher.rpartition("#")[2]                  # a server may move
    config = {key: getattr(args, key) for key in keys} | {"batches": f"{BATCH} texts, {SPEECH_BATCH} utterances"}   # numbered: the seeds
    loaded = {}
    if rank == 0:
        common.record_config(data / "config.json", config, write=False)
    common.barrier()

    def teacher():
        if "llm" not in loaded:
            loaded["llm"] = ServedTeacher(address) if common.is_url(address) else LocalTeacher(args.teacher, device, world)
        return loaded["llm"]

    def asr():
        if "asr" not in loaded:
            loaded["asr"] = common.load_whisper(args.whisper, device)
        return loaded["asr"]

    # ---- 1, 2: instructions and answers; filters; splits
    voices, unheard = Voices(args.voices, device), Voices(args.unheard_voices, device)
    if not (data / "config.json").exists():               # what can't be loaded leaves no configuration behind
        teacher(), asr()
        for own in (voices, unheard):
            own.say_all([(name, "Hello.", 1.0) for name in own.weights if "#" in name])
    if rank == 0:
        common.record_config(data / "config.json", config)
    common.barrier()
    rows, unlike = read_streams(args, teacher, rank, world)
    splits = assign_splits(unlike, args)
    items = []
    for split, chosen in splits.items():
        for row in chosen:
            prompt = common.REQUESTS[row["task"]].format(language=args.language)
            language = args.language if row["task"] == "s2tt" else "English"
            items.append(dict(id=row["id"], split=split, task=row["task"], language=language, text=row["text"],
                              prompt=prompt, response=row["response"], reference=row["reference"], audio="", seconds=0.0,
                              voice="", perturbation="", transcript="", wer=1.0, ended=row["ended"],
                              seed=derive_seed(args.seed, row["id"]), teacher=args.teacher))

    # ---- 3, 4: speech and its check, in numbered batches
    spoken = []
    with tqdm(total=len(items), desc="speak", unit="utt", disable=rank > 0) as bar:
        for batch, at in enumerate(range(0, len(items), SPEECH_BATCH)):
            path, own = data / "batches" / f"speech-{batch:04d}.jsonl", items[at:at + SPEECH_BATCH]
            if batch % world == rank and not is_spoken(path, own, data):
                common.write_jsonl(path, write_speech(own, voices, unheard, asr, args, max(1, os.cpu_count() // world)))
            bar.update(min(SPEECH_BATCH, len(items) - at))
    common.barrier()
    if rank:
        return
    for batch in range(math.ceil(len(items) / SPEECH_BATCH)):
        spoken += common.read_jsonl(data / "batches" / f"speech-{batch:04d}.jsonl", produced_by="01_synthesize.py")

    # ---- 5: splits after the bound, funnel, card
    too_long = [item for item in spoken if item["seconds"] > args.max_seconds]
    spoken = [item for item in spoken if item["seconds"] <= args.max_seconds]
    clear = [item for item in spoken if item["wer"] <= args.wer_bound]
    final = {"test_all": [item for item in spoken if item["split"] == "test"]}
    for split in common.SPLITS:
        own = [item for item in clear if item["split"] == split]
        wanted = {"train": args.n_train, "valid": args.n_valid}.get(split)
        share = [item for task in TASKS for item in [i for i in own if i["task"] == task][:math.ceil(wanted / len(TASKS))]
                 ] if wanted else own
        final[split] = share
        short = [task for task in TASKS if split == "train" and not any(item["task"] == task for item in share)]
        if short or not share:
            raise UserError(f"{data}: no {' '.join(short[:1])} item of {split} is spoken clearly enough (WER bound {args.wer_bound}, "
                            f"{args.max_seconds} s); use a larger --n-{split} in another --work, or other voices")
    for split, own in final.items():
        common.write_jsonl(data / f"{split}.jsonl", own)

    clear_ids = {item["id"] for item in clear}
    names = {"ended": "cut", "speakable": "not speakable", "length": "length", "language": "not English", "form": "form",
             "answer ended": "answer cut", "answer speakable": "answer not speakable", "short answer": "no short answer"}
    kept_ids, used = {row["id"] for row in unlike}, {item["id"] for own in final.values() for item in own}
    funnel = {}
    for stream in TASKS:
        own = [row for row in rows if row["task"] == stream]
        counts = {"sampled": len(own)} | {label: sum(row["dropped"] == key for row in own) for key, label in names.items()}
        counts["near duplicate"] = sum(not row["dropped"] and row["id"] not in kept_ids for row in own)
        counts["too long to hear"] = sum(item["task"] == stream for item in too_long)
        counts["over the WER bound"] = sum(item["task"] == stream and item["id"] not in clear_ids for item in spoken)
        counts["in a split"] = sum(row["id"] in used for row in own)
        funnel[stream] = counts
    common.write_json(data / "funnel.json", funnel)
    answered = [row for row in rows if row["response"]]
    print(write_card(data / "card.md", final, spoken, funnel, args))
    print(f"answers that ended within {args.max_new} tokens: {sum(r['ended'] for r in answered)} of {len(answered)}; "
          f"card: {data / 'card.md'}")


if __name__ == "__main__":
    common.run(main)
