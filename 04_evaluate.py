"""Stage 4: the paper's tables. Every system answers the same held-out speech, clean and under noise.

Systems: `text` the teacher on the true words x ([paper] Ref; on our items y_ref), `base` the student before
training ([ours] the assembled student's is the cascade: Whisper's transcript, read by its LLM), and what was
trained, DIR/NAME.pt. NAME-s1.pt, NAME-s2.pt are further training seeds of the system NAME.

1. [paper] Instruction following: win rate (WR) and length-controlled win rate (LC) by GPT-4o, against base,
   text, sft. [ours] --judge: an LLM by URL, asked in both orders, or a reward model; else the answer closer
   to y_ref wins, without LC. Spoken-Alpaca, the paper's set out of domain, goes in by --data FILE.jsonl.
2. [paper] Spoken question answering: accuracy. [ours] An answer is right that holds a reference's words as
   one run, after Whisper's normalisation or TriviaQA's: the paper does not give its rule. Every question, of
   a public set too, has p behind it: one to five words.
3. [paper] Translation: corpus BLEU (sacrebleu as it is, its version in results.json); [ours] chrF beside it.
4. [paper] Consistency: mean cosine of the answers to one instruction in its voices, by
   paraphrase-mpnet-base-v2; [ours] in tiny and small by WordLlama, which is no reward either; beside the
   cosine of answers to different instructions: who says one thing is consistent.
5. [ours] Agreement with y_ref, also beyond x's own words: a cosine pays for saying the question back;
   unheard voices; planned contrasts with Holm's correction.

Each number has a 95 % bootstrap interval over instructions (all voices of one together), a planned contrast a
sign-flip test over them, as a bootstrap's p is too small for few. Both are about these checkpoints on other
instructions, with several seeds too; what another training would give, the spread of the seeds says. Of less
than twenty instructions, or where nearly all agree, an interval is too narrow.

Reads DIR/data/, DIR/*.pt. Writes DIR/answers/, results.json, results.md, results.png.

    python 04_evaluate.py                              every system in DIR
    torchrun --nproc-per-node 8 04_evaluate.py         the same, systems shared among 8 GPUs
    python 04_evaluate.py --data llama_questions:PATH  a public set as published -> results-NAME.json; if the
                                                       teacher fills several GPUs, so with --systems text
                                                       before torchrun
    python 04_evaluate.py --ask question.wav           every system's answer to one recording; with
                                                       --work assets, of the checkpoints shipped there
    python 04_evaluate.py --draw results.json          tables and figure of a results.json again
"""
import contextlib
import functools
import itertools
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import common                                             # first: it says in one line what is missing
from common import UserError

import numpy as np
import sacrebleu
import torch
from matplotlib import pyplot
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

FLAGS = {
    "systems": dict(help="comma-separated; default: all that DIR holds"),
    "conditions": dict(help="comma-separated, e.g. clean,babble:8,reverb:0.6; the second leads contrasts"),
    "data": dict(metavar="FILE|KIND:PATH", help="JSONL (id, audio, task, instruction, reference), or a KIND: "
                 "llama_questions, openaudiobench, covost2, mustc, fleurs"),
    "judge": dict(metavar="URL|MODEL", help="an LLM at http://HOST:PORT/v1[#MODEL], or a reward model"),
    "ask": dict(metavar="FILE", help="one recording: print every system's answer"),
    "draw": dict(metavar="FILE", help="a results.json: write its tables and figure beside it")
} | common.STUDENT_FLAG
UNTRAINED = ("text", "base")
ORDER = (*UNTRAINED, "sft", "sft+", "kd", "rba-single", "rba-group")   # other names follow
OPPONENTS = ("base", "text", "sft")                       # [paper] Base, Ref, SFT
CONTRASTS = (("rba-single", "sft+"), ("rba-group", "sft+"), ("rba-group", "rba-single"))   # planned
RESAMPLES = 10_000


class Column(NamedTuple):
    """What a number of the tables is."""
    task: str
    metric: str
    against: str = ""                                     # the other system of a win rate or a difference
    voices: str = "all"                                   # "heard" in training, or "unheard"

    def __str__(self):
        than = " −" if self.metric == "accuracy" else " against"
        name = f"{self.task} {self.metric}" + f", {self.voices}" * (self.voices != "all")
        return name + f"{than} {self.against}" * bool(self.against)


ACCURACY, SIMILARITY = Column("sqa", "accuracy"), Column("instruct", "similarity")
COSINES = ("similarity", "beyond x", "consistency", "consistency, heard differently",
           "different instructions")                      # up to 1
MAIN = (ACCURACY, SIMILARITY, Column("s2tt", "BLEU"))     # of the figure
TABLES = {
    "Win rate, %": [Column("instruct", "WR", other) for other in OPPONENTS],
    "Length-controlled win rate, %": [Column("instruct", "LC", other) for other in OPPONENTS],
    "Spoken question answering, %": [ACCURACY] + [ACCURACY._replace(against=other) for other in OPPONENTS],
    "Translation": [Column("s2tt", "BLEU"), Column("s2tt", "chrF")],
    "Consistency over voices": [
        Column("instruct", "consistency"), Column("instruct", "consistency, heard differently"),
        Column("instruct", "different instructions"), ACCURACY],
    "Agreement with y_ref": [
        SIMILARITY, Column("instruct", "beyond x"), Column("instruct", "chrF"), Column("instruct", "words")],
    "Heard and unheard voices": [
        ACCURACY._replace(voices="heard"), ACCURACY._replace(voices="unheard"),
        SIMILARITY._replace(voices="heard"), SIMILARITY._replace(voices="unheard")]}


# ---------------------------------------------------------------------------------- public sets, as published
QUESTIONS = {                                             # table: recording, question, answers, between them
    "llama_questions_300.tsv": ("Wav Filename", "Questions", "Answer", None),
    "llama_questions.csv": ("audio_filename", "Questions", "Answer", None),
    "web_questions.csv": ("audio_filename", "question", "answers", ";"),
    "trivia_qa.csv": ("audio_filename", "question", "answer_normalized_aliases", ",")}


def question_table(path):
    """DIR of google-research-datasets/LLAMA1-Test-Set, recordings beside its table; or of OpenAudioBench,
    eval_datas/SUBSET, recordings in audios/."""
    [table] = [path / name for name in QUESTIONS if (path / name).is_file()]
    recording, question, answer, between = QUESTIONS[table.name]
    google = table.suffix == ".tsv"
    for row in common.table_rows(table, **common.TSV if google else {}):
        references = row[answer].split(between) if between else [row[answer]]
        yield dict(audio=row[recording] if google else f"audios/{row[recording]}", text=row[question],
                   reference=references)


def own_items(path):
    """JSONL of id, audio, task, instruction, reference (one or a list), language; or a split of 01's."""
    for row in common.read_jsonl(path):
        yield row | dict(text=str(row.get("text") or row["instruction"]), audio=str(row["audio"]))


READERS = {"llama_questions": question_table, "openaudiobench": question_table} | common.TRANSLATIONS


def complete(item, number, language):
    """Give a public set's item, the number-th, the fields of ours."""
    item["id"] = str(item.get("id", number))
    item["group"] = str(item.get("group", item["id"]))    # else one voice
    item.setdefault("task", "s2tt" if "language" in item else "sqa")
    item["language"] = common.language_name(item.get("language", language))
    item.setdefault("prompt", common.REQUESTS[item["task"]].format(language=item["language"]))
    references = item.get("reference", [])
    references = references if isinstance(references, list) else [references]
    texts = [str(text).strip() for text in references if text is not None]
    item["reference"] = [text for text in texts if common.has_words(text)]


def read_set(spec, language):
    """--data: FILE or KIND:PATH -> name, folder of the audio, items with every field.

    An item that can't be used says why under "unusable" and has an empty answer, which is wrong, and in a win
    rate a half: the denominator never shrinks.
    """
    kind, _, path = spec.partition(":")
    kind, path = (kind, Path(path)) if kind in READERS else ("", Path(spec))
    folder = (path if path.is_dir() else path.parent).resolve()
    try:
        items = list(READERS.get(kind, own_items)(path))
        for number, item in enumerate(items):
            complete(item, number, language)
    except Exception as error:                            # csv and yaml have errors of their own
        raise UserError(f"--data {spec}: not as published ({type(error).__name__}: {str(error)[:200]}); give "
                        f"FILE.jsonl or KIND:PATH, KIND one of {', '.join(READERS)}") from None
    for item in tqdm(items, desc="read", unit="item", leave=False):
        try:
            common.item_wave(folder, item)
            if item["task"] != "instruct" and not item["reference"]:
                raise UserError(f"item {item['id']}: its reference has no words")
        except UserError as error:
            item["unusable"] = str(error)
            tqdm.write(f"counts as wrong: {error}")
    if not usable(items):
        raise UserError(f"--data {spec}: no item can be used")
    languages = sorted({item["language"] for item in items if item["task"] == "s2tt"})
    if len(languages) > 1:
        raise UserError(f"--data {spec}: translations into {' and '.join(languages)}; give a file for each")
    name = "-".join(dict.fromkeys([kind or folder.name, folder.name, path.stem, *languages]))
    return name, folder, items


def usable(items):
    return [item for item in items if "unusable" not in item]


# ---------------------------------------------------------------------------------------------------- answers
def choose_checkpoints(args):
    """Names of the checkpoints to evaluate, in the tables' order; UserError for one that is not in DIR."""
    trained = [path.stem for path in args.work.glob("*.pt") if not path.stem.endswith(".resume")]
    chosen = args.systems.split(",") if args.systems else [*UNTRAINED, *trained]
    for name in set(chosen) - {*UNTRAINED, *trained}:
        raise UserError(f"--systems {name}: no {args.work / name}.pt; there are {', '.join(sorted(trained))}")
    place = {name: at for at, name in enumerate(ORDER)}
    return sorted(set(chosen), key=lambda name: (place.get(system_of(name), len(ORDER)), name))


def system_of(checkpoint):
    """"sft-s1", a training seed -> "sft", its system."""
    return re.sub(r"-s\d+$", "", checkpoint)


def field(rows, name):
    return [row[name] for row in rows]


def of_task(rows, task):
    return [row for row in rows if row["task"] == task]


def answer(model, checkpoint, items, heard, args):
    """Greedy answers to N items, whose speech Whisper and the SpeechLM `heard`: N strings."""
    if checkpoint != "text":
        model.load(args.work / f"{checkpoint}.pt" if checkpoint != "base" else "none")
        replies = model.answer(heard, field(items, "prompt"), args.max_new)
    elif "response" in items[0]:                          # y_ref, as 01 wrote it
        return field(items, "response")
    else:
        tokenizer, llm = common.load_llm(args.teacher, common.spread(model.device))
        prompts = [common.text_ids(tokenizer, item["text"], item["prompt"]) for item in items]
        end_id = common.chat_parts(tokenizer)[2]
        replies = common.answer_typed(llm, tokenizer, prompts, end_id, args.max_new)
    return [reply.text for reply in replies]


def kept_answers(model, checkpoint, folder, condition, items, heard, args):
    """One checkpoint's answers under one condition, kept in `folder`: rows of an item, the answer, how many
    words that has, what Whisper heard. What can't be heard, and is not in `heard`, has an empty answer."""
    path = folder / f"{checkpoint}.{condition.replace(':', '-')}.jsonl"
    weights = "none" if checkpoint in UNTRAINED else args.work / f"{checkpoint}.pt"
    key = common.digest([items, field(heard, "text"), args.student, args.teacher, args.max_new,
                         common.fingerprint(weights)])    # of all that the answers depend on
    if not path.exists() or common.read_jsonl(path)[0]["key"] != key:
        rows = [item | dict(answer="", words=0, transcript="", key=key) for item in items]
        said = answer(model, checkpoint, usable(items), heard, args)
        for row, text, transcript in zip(usable(rows), said, field(heard, "text")):
            row |= dict(answer=text, words=len(text.split()), transcript=transcript)
        common.write_jsonl(path, rows)
    return common.read_jsonl(path)


# ------------------------------------------------------------------------------ bootstrap over instructions
@functools.lru_cache(4)
def resample_counts(n):
    """(1 + R, n): how often each of n instructions counts: once in the first row, then as drawn."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.vstack([np.ones(n), drawn])


def by_group(statistics, groups):
    """(N, C) of utterances, their groups -> sums over each group (G, C), sizes (G, 1); by name."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((index.max() + 1, statistics.shape[1]))
    np.add.at(sums, index, statistics)
    return sums, np.bincount(index)[:, None]


def group_means(values, groups):
    """(N,) -> (G,): an instruction's mean over its utterances."""
    sums, sizes = by_group(np.asarray(values, float)[:, None], groups)
    return (sums / sizes)[:, 0]


class Measured(NamedTuple):
    """A number of a table: its score (1 + R,), the number and that of each of R resamples, which all systems
    share; and the values (G,) of the instructions where it is their mean."""
    score: np.ndarray
    values: np.ndarray | None = None


def mean_of(values):
    """(G,) of instructions -> Measured of their mean."""
    return Measured(resample_counts(len(values)) @ values / len(values), values)


def average(parts):
    """Measured of several training seeds -> of their mean."""
    values = None if parts[0].values is None else np.mean([part.values for part in parts], 0)
    return Measured(np.mean([part.score for part in parts], 0), values)


def resampled_sums(statistics, groups):
    """(N, C) of utterances -> sums over each resample (1 + R, C), all voices of an instruction together."""
    sums, _ = by_group(np.asarray(statistics, float), groups)
    return resample_counts(len(sums)) @ sums


def sign_flip_p(differences):
    """Two-sided p of differences (G,) of instructions: how often their mean is as large with random signs."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (RESAMPLES, len(differences)))
    as_large = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return float(1 + as_large.sum()) / (1 + RESAMPLES)


def holm(p):
    """Holm's correction of m p-values: the k-th smallest times m - k + 1, never falling; in p's order."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)


# ---------------------------------------------------------------------------------------------------- metrics
def length_controlled(wins, lengths, other_lengths, counts):
    """Win rate in % at equal lengths, after AlpacaEval 2 (arXiv 2404.04475); not its official number [ours].

    Logistic regression of the preference on [1, tanh((len_other - len) / std)]; then the length term is left
    out. A Gaussian prior holds its coefficient near official fits (-1.5 to -2.1): few items tell little.
    wins (N,) 0 to 1, lengths in words (N,) of both, counts (R, N) of each resample -> (R,).
    """
    gap = other_lengths - lengths
    x = np.tanh(gap / gap.std()) if gap.std() > 1e-9 else np.zeros(len(gap))
    design = np.stack([np.ones(len(x)), x], 1)                                             # (N, 2)
    products = (design[:, :, None] * design[:, None]).reshape(-1, 4)                       # (N, 4)
    prior, weight = np.array([0.0, -1.6]), np.array([0.01, 1.0])   # the prior's mean and precision
    theta = np.tile(prior, (len(counts), 1))                                               # (R, 2)
    for _ in range(25):                                   # Newton's method, for all resamples at once
        p = 1 / (1 + np.exp(-theta @ design.T))                                            # (R, N)
        gradient = (counts * (wins - p)) @ design - weight * (theta - prior)               # (R, 2)
        curvature = ((counts * p * (1 - p)) @ products).reshape(-1, 2, 2) + np.diag(weight)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        theta += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    return 100 / (1 + np.exp(-theta[:, 0]))


def consistency(vectors, groups):
    """Unit rows (N, d) of answers, at least two a group -> mean cosine of each group's pairs (G,), and the
    score of the mean cosine of answers to different instructions."""
    sums, sizes = by_group(vectors, groups)                                                # (G, d), (G, 1)
    squares, _ = by_group((vectors ** 2).sum(1, keepdims=True), groups)                    # (G, 1)
    same = ((sums ** 2).sum(1, keepdims=True) - squares) / (sizes * (sizes - 1))           # i != j
    means = sums / sizes
    different = 1 - np.eye(len(sums))                                                      # (G, G)
    counts = resample_counts(len(sums))                                                    # (1 + R, G)
    pairs = ((counts @ different) * counts).sum(1)
    cosines = ((counts @ (means @ means.T * different)) * counts).sum(1)
    cosines = cosines / np.maximum(pairs, 1)
    return same[:, 0], np.where(pairs > 0, cosines, cosines[0])   # of one instruction, drawn again and again


def embed_answers(by_condition, encoder, device):
    """{text: unit row (d,)} of every instruction, answer to it and first reference, by an encoder that is no
    reward: sentence embeddings, or `wordllama`, the mean of static token vectors (github.com/dleemiller)."""
    texts = set()
    for answers in by_condition.values():
        for row in of_task(sum(answers.values(), []), "instruct"):
            texts.update((row["text"], row["answer"], *row["reference"][:1]))
    texts = sorted(texts)
    if encoder != "wordllama":
        return dict(zip(texts, common.Embedder(encoder, device)(texts).double().numpy())) if texts else {}
    with common.loading(encoder, "sentence embedder") as path:
        table = load_file(f"{path}/model.safetensors")["embedding.weight"].double()        # (32000, 256)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{path}/tokenizer.json")
    vectors = {}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        vectors[text] = torch.nn.functional.normalize(table[ids].sum(0), dim=0).numpy()
    return vectors


def cosines(vectors, rows):
    """(N,) of each answer to its item's first reference. vectors: {text: unit row}."""
    return np.array([vectors[row["answer"]] @ vectors[row["reference"][0]] for row in rows])


def beyond_x(vectors, rows):
    """(N,) of each answer: cos(y, y_ref) - cos(y, x) cos(x, y_ref), 0 where it says the question back, which
    earns a high cosine to a y_ref that takes up its words."""
    echoes = []
    for row in rows:
        x, y_ref = vectors[row["text"]], vectors[row["reference"][0]]
        echoes.append((vectors[row["answer"]] @ x) * (x @ y_ref))
    return cosines(vectors, rows) - echoes


def without_articles(text):
    """TriviaQA's own normalisation, which its published answers went through."""
    return re.sub(r"\W|_|\b(an?|the)\b", " ", text.lower())


def is_right(answer, reference):
    """The reference's words stand in the answer as one run; of several words, also by TriviaQA's rules."""
    several = len(without_articles(reference).split()) > 1
    return common.is_contained(reference, answer) or several and common.is_contained(
        reference, answer, without_articles)


def measure_sqa(rows, groups, _):
    right = []
    for row in rows:
        right.append(any(is_right(row["answer"], reference) for reference in row["reference"]))
    return {"accuracy": mean_of(100 * group_means(right, groups))}


def measure_s2tt(rows, groups, _):
    scores, references = {}, list(itertools.zip_longest(*[row["reference"] or [""] for row in rows]))
    bleu = sacrebleu.BLEU(tokenize=common.bleu_tokenizer(rows[0]["language"]))             # on raw text
    for name, metric in (("BLEU", bleu), ("chrF", sacrebleu.CHRF())):
        statistics = metric._extract_corpus_statistics(field(rows, "answer"), references)     # (N, C)
        sums = resampled_sums(statistics, groups).tolist()                                  # (1 + R, C)
        scores[name] = Measured(np.array([metric._compute_score_from_stats(row).score for row in sums]))
    return scores


def measure_instruct(rows, groups, vectors):
    scores = {"words": mean_of(group_means(field(rows, "words"), groups))}
    if all(field(rows, "reference")):                     # without references a judge alone compares
        values = [sacrebleu.sentence_chrf(row["answer"], row["reference"]).score for row in rows]
        scores["chrF"] = mean_of(group_means(values, groups))
        scores["similarity"] = mean_of(group_means(cosines(vectors, rows), groups))
        scores["beyond x"] = mean_of(group_means(beyond_x(vectors, rows), groups))
    if min(Counter(groups).values()) > 1:                 # several voices
        answers = np.stack([vectors[row["answer"]] for row in rows])
        same, different = consistency(answers, groups)
        scores["consistency"] = mean_of(same)
        if len(same) > 1:
            scores["different instructions"] = Measured(different)
        transcripts = {}
        for row in rows:
            transcripts.setdefault(row["group"], set()).add(common.normalise(row["transcript"]))
        unlike = same[[len(transcripts[group]) > 1 for group in sorted(transcripts)]]
        if len(unlike):
            scores["consistency, heard differently"] = mean_of(unlike)
    return scores


MEASURES = {"instruct": measure_instruct, "sqa": measure_sqa, "s2tt": measure_s2tt}


def measure(rows, vectors, train_voices):
    """One checkpoint's rows -> {Column: Measured} of all that needs no other system: of all of them, then of
    those in voices that training heard, and in others."""
    parts, scores = {"all": rows}, {}
    for row in rows if train_voices else ():
        parts.setdefault("heard" if row["voice"] in train_voices else "unheard", []).append(row)
    for (voices, some), (task, function) in itertools.product(parts.items(), MEASURES.items()):
        chosen = of_task(some, task)
        if chosen:
            for metric, score in function(chosen, field(chosen, "group"), vectors).items():
                scores[Column(task, metric, voices=voices)] = score
    return scores


# ---------------------------------------------------------------------------------------------------- judges
# A judge compares two checkpoints' rows (an item with its answer) -> N preferences, 0 to 1, for the first.
QUESTION = ("Which of two answers to a spoken request is better: more helpful, more correct, more to the "
            "point? Reply with the letter A or B alone.\n\nRequest: {x}\n\nAnswer A: {a}\n\nAnswer B: {b}")


def read_verdict(said):
    """A judge's reply -> 1 where it is, or its first sentence is, the letter A; 0 for B; 0.5 for all else."""
    letter = re.match(r"\W*(?:[Aa]nswer\W+)?([AB])\W*?(?:$|[.:\n])", said)
    return float(letter[1] == "A") if letter else 0.5


class ServedJudge(common.Served):
    """An LLM behind an OpenAI-compatible URL, asked in both orders; it reads the true words x."""

    def prefers(self, row, first, second):
        x = f"{row['text']}\n{row['prompt']}".strip()
        question = QUESTION.format(x=x, a=first["answer"], b=second["answer"])
        said = self.call("chat/completions", lambda reply: str(reply["choices"][0]["message"]["content"]),
                         model=self.model, messages=[dict(role="user", content=question)], temperature=0,
                         max_tokens=8)
        return read_verdict(said)

    def __call__(self, rows, others):
        with ThreadPoolExecutor(32) as pool:
            forth = list(pool.map(self.prefers, rows, rows, others))
            back = list(pool.map(self.prefers, rows, others, rows))
        if len(rows) > 4 and set(forth + back) == {0.5}:
            raise UserError(f"{self.name}: none of its {2 * len(rows)} replies is A or B; give a judge that "
                            "answers at once, without thinking aloud")
        return [(a + 1 - b) / 2 for a, b in zip(forth, back)]


class RewardJudge(common.RewardModel):
    """A reward model: the higher reward wins, equal ones are half a win each."""

    @functools.cache                                      # an answer meets those of many systems
    def reward(self, text, prompt, answer):
        [reward] = super().__call__([dict(text=text, prompt=prompt)], [answer])
        return reward

    def __call__(self, rows, others):
        def rewards(some):
            return [self.reward(row["text"], row["prompt"], row["answer"]) for row in some]
        return ((1 + np.sign(np.subtract(rewards(rows), rewards(others)))) / 2).tolist()


class KeptJudge:
    """A judge whose verdicts are lines of a file: two answers are judged once, a kill loses one batch."""

    def __init__(self, name, device, path):
        self.judge = ServedJudge(name) if "://" in name else RewardJudge(name, device)
        self.name, self.path = getattr(self.judge, "name", name), path
        lines = common.read_jsonl(path, torn=True) if path.exists() else []
        common.write_jsonl(path, lines)                   # without what a kill cut
        self.verdicts = {line["key"]: line["prefers"] for line in lines}

    def __call__(self, rows, others):
        keys, new = [], {}                                # new: {key: a pair that was never judged}
        for pair in zip(rows, others):                    # one verdict serves both orders of a pair
            first, second = sorted(pair, key=lambda row: row["answer"])
            said = first["answer"], second["answer"]
            keys.append(common.digest([self.name, QUESTION, first["text"], first["prompt"], said]))
            if said[0] == said[1]:
                self.verdicts[keys[-1]] = 0.5             # nobody need be asked
            elif keys[-1] not in self.verdicts:
                new[keys[-1]] = first, second
        for at in tqdm(range(0, len(new), 256), desc="judge", unit="x256", leave=False):
            some = list(new)[at:at + 256]
            self.verdicts |= zip(some, self.judge(*zip(*(new[key] for key in some))))
            common.append_jsonl(self.path, [dict(key=key, prefers=self.verdicts[key]) for key in some])
        turned = [row["answer"] > other["answer"] for row, other in zip(rows, others)]
        return [1 - self.verdicts[key] if back else self.verdicts[key] for key, back in zip(keys, turned)]


def closer(rows, others, vectors):
    """[ours] Without --judge the answer with the higher cosine to y_ref is preferred, ties one half: (N,)."""
    margins = cosines(vectors, rows) - cosines(vectors, others)
    return (1 + np.sign(np.where(np.abs(margins) < 1e-6, 0, margins))) / 2


# ------------------------------------------------------------------------------------ numbers of the tables
def compare(answers, alone, checkpoint, other, judge, vectors):
    """One checkpoint against another: accuracy's difference and win rates in %, {Column: Measured}; LC by a
    judge alone, of R / 10 resamples. answers: {checkpoint: rows}; alone: {checkpoint: its `measure`}."""
    found, own, its = {}, alone[checkpoint], alone[other]
    if ACCURACY in own:
        found[ACCURACY] = mean_of(own[ACCURACY].values - its[ACCURACY].values)
    rows, others = of_task(answers[checkpoint], "instruct"), of_task(answers[other], "instruct")
    y_ref = "text" in (checkpoint, other) and "response" in answers[other][0]     # it is closest to itself
    if not rows or not judge and (y_ref or not all(field(rows, "reference"))):
        return found
    preferences = judge(rows, others) if judge else closer(rows, others, vectors)
    wins = group_means(preferences, field(rows, "group"))
    found[Column("instruct", "WR")] = mean_of(100 * wins)
    if judge:
        words, counts = Column("instruct", "words"), resample_counts(len(wins))[:1 + RESAMPLES // 10]
        rates = length_controlled(wins, own[words].values, its[words].values, counts)
        found[Column("instruct", "LC")] = Measured(rates)
    return found


def numbers_of(answers, systems, judge, vectors, train_voices):
    """Rows of the tables and of the planned contrasts under one condition. answers: {checkpoint: its rows};
    systems: {system: its checkpoints, one a training seed}; train_voices: none where the set names none."""
    alone = {name: measure(rows, vectors, train_voices) for name, rows in answers.items()}
    numbers = word_error_rates(next(iter(answers.values())))
    for system, checkpoints in systems.items():
        seeds = [dict(alone[checkpoint]) for checkpoint in checkpoints]
        for other, opponents in systems.items():
            if (other not in OPPONENTS or other == system) and (system, other) not in CONTRASTS:
                continue
            for checkpoint, scores in zip(checkpoints, seeds):
                parts = [compare(answers, alone, checkpoint, its, judge, vectors) for its in opponents]
                for column in parts[0]:
                    scores[column._replace(against=other)] = average([part[column] for part in parts])
        for column in seeds[0]:
            numbers.append(number(system, column, [scores[column] for scores in seeds]))
    return numbers


def number(system, column, parts):
    """A row of results.json from the Measured of a system's seeds: their mean, its interval, every seed's
    value, of a planned contrast p of no difference."""
    mean, seeds = average(parts), [float(part.score[0]) for part in parts]
    low, high = np.percentile(mean.score[1:], [2.5, 97.5]).tolist()
    even = 0 if column.metric == "accuracy" else 50       # a win rate of 50 % is no difference
    planned = (system, column.against) in CONTRASTS and column.metric != "LC"
    p = sign_flip_p(mean.values - even) if planned else None
    return column._asdict() | dict(system=system, value=float(mean.score[0]), low=low, high=high,
                                   seeds=seeds if len(seeds) > 1 else [], planned=planned, p=p)


def word_error_rates(rows):
    """Whisper's WER in %, by task: a covariate."""
    numbers = []
    for task in dict.fromkeys(field(rows, "task")):
        chosen = of_task(rows, task)
        errors = [common.word_errors(row["text"], row["transcript"]) for row in chosen]    # (edits, words)
        edits, words = resampled_sums(errors, field(chosen, "group")).T
        numbers.append(number("Whisper", Column(task, "WER"), [Measured(100 * edits / words)]))
    return numbers


# ----------------------------------------------------------------------------------------------------- report
def cell(row):
    """value [low, high] (seeds)"""
    if row is None:
        return "–"
    digits = 3 if row["metric"] in COSINES else 1
    numbers = row["value"], row["low"], row["high"], *row["seeds"]
    value, low, high, *seeds = [f"{number:.{digits}f}" for number in numbers]
    return f"{value} [{low}, {high}]" + (f" ({', '.join(seeds)})" if seeds else "")


def markdown(title, head, lines):
    """A table with a title; lines: a name and cells each."""
    lines = [head, ["---"] * len(head), *lines]
    return f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def column_of(row):
    return Column(row["task"], row["metric"], row["against"], row["voices"])


def condition_tables(results, condition):
    """All tables of one condition: list of Markdown."""
    found, out = {}, [f"\n## {condition}"]
    for row in results["rows"]:
        if row["condition"] == condition:
            found[row["system"], column_of(row)] = row
            if row["metric"] == "WER":
                out.append(f"\nWhisper's WER, {row['task']}: {cell(row)} %.")
    present, shown = {column for _, column in found}, set()
    for title, columns in TABLES.items():
        columns = [column for column in columns if column in present]
        if shown.issuperset(columns):                     # nothing that another table has not
            continue
        shown.update(columns)
        lines = []
        for system in results["systems"]:
            cells = [cell(found.get((system, column))) for column in columns]
            if set(cells) != {"–"}:
                lines.append([system, *cells])
        out.append(markdown(title, ["", *map(str, columns)], lines))
    return out


def contrast_table(results):
    """The planned contrasts under every condition; those under the leading one are tested."""
    lines = []
    for condition in results["conditions"]:
        rows = [row for row in results["rows"] if row["condition"] == condition and row["planned"]]
        for row, corrected in zip(rows, holm(field(rows, "p"))):
            ps = ["–", "–"]
            if condition == results["leading"]:
                ps = [f"{row['p']:.4f}", f"{corrected:.4f}" + ("\\*" if corrected < 0.05 else "")]
            lines.append([row["system"], condition, str(column_of(row)), cell(row), *ps])
    head = ["system", "condition", "metric", "value", "p", "p, Holm"]
    return [markdown("Planned contrasts", head, lines)] if lines else []


def plot(results, path):
    """The main metrics of every system with their intervals, a marker for each condition; seeds as dots."""
    systems = results["systems"]
    figure, axes = pyplot.subplots(1, len(MAIN), figsize=(4.4 * len(MAIN), 3.6))
    for row in results["rows"]:
        if column_of(row) in MAIN:
            axis = axes[MAIN.index(column_of(row))]
            k = results["conditions"].index(row["condition"])
            x = systems.index(row["system"]) + 0.12 * k
            spread = np.maximum([[row["value"] - row["low"]], [row["high"] - row["value"]]], 0)
            label = row["condition"] if row["system"] == systems[0] else None
            axis.errorbar(x, row["value"], spread, fmt="osv^Dx*"[k % 7], color=f"C{k}", label=label)
            axis.scatter([x + 0.05] * len(row["seeds"]), row["seeds"], s=5, color=f"C{k}")
            axis.set_title(str(column_of(row)))
            axis.set_xticks(range(len(systems)), systems, rotation=35, ha="right")
            axis.legend(fontsize=7)
    for axis in axes:
        axis.set_visible(axis.has_data())
    figure.tight_layout()
    common.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def read_results(path):
    """A results.json; UserError for another file."""
    results = None
    with contextlib.suppress(ValueError):                 # no JSON, or no UTF-8
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(results, dict) or "rows" not in results:
        raise UserError(f"--draw {path}: no results.json of this script")
    return results


def report(results, path):
    """results.json's content -> `path`.md and .png; prints the tables."""
    judge = results["judge"] or f"none: the closer answer to y_ref ({results['encoder']}) wins"
    lines = [f"# Results\n\nPreset `{results['preset']}`, teacher `{results['teacher']}`, student "
             f"`{results['student']}`; {results['source']}: {', '.join(results['items'])}. Judge: {judge}. "
             "95 % bootstrap intervals over instructions, about these checkpoints alone, too narrow for less "
             "than twenty; in round brackets training seeds. \\* Holm's p < 0.05 over the planned contrasts "
             f"under {results['leading']}; nothing else is tested. On our items `text` is y_ref and the "
             "references are its: agreement, not truth. rba-group was rewarded by BLEU on s2tt. LC: at equal "
             "lengths in words, not AlpacaEval's official number. Similarity: cosine to y_ref; beyond x: of "
             "that, what does not come from the question's own words; different instructions: cosine of "
             "their answers, which a system that always says one thing has high; (un)heard: voices that "
             "training (never) had."]
    if results["unusable"]:
        lines.append(f"\nItems that can't be used and count as wrong: {', '.join(results['unusable'])}.")
    lines += contrast_table(results)
    for condition in results["conditions"]:
        lines += condition_tables(results, condition)
    common.write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    plot(results, path.with_suffix(".png"))
    print("\n".join(lines), f"\n\n{path.with_suffix('')}.md, .json, .png")


# ------------------------------------------------------------------------------------------------------ main
def ask(args, checkpoints):
    """Print every system's answer to one recording."""
    wave, model = common.read_audio(args.ask), common.load_speechlm(vars(args), common.setup_processes())
    heard = model.listen([wave])
    print(f"{args.ask}: {len(wave) / common.RATE:.1f} s; Whisper hears: {heard[0]['text']}")
    for checkpoint in checkpoints:
        if checkpoint != "text":                          # nobody typed the words
            [said] = answer(model, checkpoint, [dict(prompt="")], heard, args)
            print(f"{checkpoint:>10} | {said}")


def facts_of(args, items, systems, judge):
    """results.json without its numbers: all that the report says of the run."""
    counts = []
    for task in dict.fromkeys(field(items, "task")):
        chosen = of_task(items, task)
        counts.append(f"{task} {len(common.groups_of(chosen))} instructions in {len(chosen)} utterances")
    return dict(preset=args.preset, seed=args.seed, teacher=args.teacher, student=args.student,
                encoder=args.encoder, items=counts,
                source=f"`{args.data}`" if args.data else "held-out speech of 01",
                unusable=[item["id"] for item in items if "unusable" in item],
                judge=judge and judge.name, conditions=args.conditions, leading=args.conditions[:2][-1],
                systems=list(systems), rows=[]) | common.environment()


def main():
    args = common.parse_args(__doc__, FLAGS)
    if args.draw:
        return report(read_results(args.draw), Path(args.draw))
    checkpoints, systems = choose_checkpoints(args), {}
    if args.ask:
        return ask(args, checkpoints)
    args.conditions = list(dict.fromkeys(args.conditions.split(",")))
    for condition in args.conditions:
        common.parse_condition(condition)
    device = common.setup_processes()
    # ---- items
    name, folder, window = "test", args.work / "data", args.window
    if args.data:
        (name, folder, items), window, train_voices = read_set(args.data, args.language), 30.0, set()
    else:
        items = common.read_items(args.work, "test")
        train_voices = set(field(common.read_items(args.work, "train"), "voice"))
    kept = args.work / "answers" / name
    # ---- models
    judge = None
    if args.judge and common.rank() == 0:
        judge = KeptJudge(args.judge, device, kept / "judged.jsonl")
    model = common.load_speechlm(vars(args), device)
    if "text" in checkpoints and getattr(args, "served", False) and "response" not in items[0]:
        checkpoints.remove("text")                        # [ours] a served teacher answers in 01 alone
    if not checkpoints:
        raise UserError(f"--systems {args.systems}: a served teacher answers in 01 alone; name others")
    for checkpoint in checkpoints:
        systems.setdefault(system_of(checkpoint), []).append(checkpoint)
    # ---- hear and answer
    by_condition = {}
    for condition in args.conditions:
        heard = common.listen_to_split(model, args.work, name, usable(items), condition, window, folder)
        def answers_of(checkpoint):
            return [kept_answers(model, checkpoint, kept, condition, items, heard, args)]
        rows = common.shared(checkpoints, answers_of, desc=f"answer {condition}")
        by_condition[condition] = dict(zip(checkpoints, rows))
    if common.rank():
        return
    # ---- measure and report
    vectors = embed_answers(by_condition, args.encoder, device)
    results = facts_of(args, items, systems, judge)
    for condition, rows in by_condition.items():
        for row in numbers_of(rows, systems, judge, vectors, train_voices):
            results["rows"].append(dict(condition=condition) | row)
    path = args.work / (f"results-{name}.json" if args.data else "results.json")
    common.write_json(path, results)
    report(results, path)


if __name__ == "__main__":
    common.run(main)
