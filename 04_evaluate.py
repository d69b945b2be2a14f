"""Stage 4: every system on the same held-out items, clean, in unheard voices, and under acoustic conditions.

[paper] instruction following, spoken question answering and speech-to-text translation, against distillation.
[ours] the protocol:
- Systems: `text` (LoRA off, gold words: the teacher where the two LLMs are one), `cascade` (Whisper's transcript, same
  LLM), `sft`, `sft+`, `kd`, `opd`, `rba`, `rba+opd`: those that DIR holds; any other NAME.pt likewise.
- `sqa`: an answer is right when the reference stands in it as a run of words after Whisper's English normaliser;
  the same in its first 16 words, exact match and token F1 beside it. `instruct`: sentence chrF to y_T, cosine to y_T under an
  encoder that is no reward (`similarity`) and under the reward's (`semantic`), the teacher's mean log-likelihood of the answer
  given the gold words, and the win rate against `sft` by it (ties one half). `s2tt`: corpus BLEU and chrF (sacrebleu; against the
  teacher's translation, so agreement, not quality). WER of Whisper's transcript: covariate.
- 95 % percentile bootstrap over items; differences to `sft` paired. A star where the interval of the difference excludes 0. † a
  metric the system was trained on: never the headline. NAME, NAME-s1, NAME-s2 are one system's training seeds: one row, the mean
  over them with their range; resamples draw seeds as well as items. A second table sets every system against every other.
- Gap recovered = (system - sft) / (text - sft), only where the interval of text - sft excludes 0.

Reads DIR/data/test_all.jsonl (before the WER bound) and DIR/*.pt. Writes DIR/answers/*.jsonl, results.json,
results.md, results.png.

    python 04_evaluate.py                      every system in DIR
    python 04_evaluate.py --ask question.wav   every system's answer to one recording
    python 04_evaluate.py --draw FILE.json     table and plot of a results.json again
"""
import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common                                             # first: it says in one line what is missing
from common import TASKS, UNTRAINED, UserError

import numpy as np
import sacrebleu
import torch
from tqdm import tqdm

FLAGS = {"systems": dict(help="comma-separated; default: all that DIR holds"),
         "conditions": dict(help="comma-separated acoustic conditions, clean first, e.g. clean,noise:5,reverb:0.6,speed:1.5; all: three "
                                 "severities of each of the seven kinds"),
         "data": dict(metavar="FILE|KIND:PATH", help="items to use instead of DIR/data/test_all.jsonl: FILE.jsonl with id, audio, task, "
                      f"instruction, reference, another split of 01's, or a public set, KIND one of {', '.join(common.READERS)} (README)"),
         "draw": dict(metavar="FILE", help="a results.json: write its table and plot beside it"),
         "judge": dict(metavar="URL|MODEL", help="who compares instruct answers with sft's: an OpenAI-compatible URL (http://HOST:PORT/v1, "
                                                "or …/v1#MODEL), or a reward model"),
         "ask": dict(metavar="FILE", help="one recording (wav, flac, ogg, mp3; any rate): print every system's answer")}
CHECKPOINTS = ("sft", "sft+", "kd", "opd", "rba", "rba+opd")   # and, if asked for by name, `init`: no training at all
UNHEARD = ", unheard voices"
NAMES = {"wins": "% wins against sft by log π_T", "LC wins": "the same at equal lengths (not AlpacaEval's official number)",
         "judged": "% preferred to sft by the judge", "LC judged": "the same at equal lengths (not AlpacaEval's official number)", "WER": "WER of Whisper"}
SOON = "accuracy in 16 words"                             # containment favours who says more
PRIMARY = {"sqa": "accuracy", "instruct": "chrF"}         # rewarded nowhere
SHOWN = (*PRIMARY.items(), ("s2tt", "BLEU"))              # in the figures
SEVERITIES = {"noise": (10, 5, 0), "babble": (10, 5, 0), "reverb": (0.3, 0.6, 1.0), "speed": (1.25, 1.5, 1.75),
              "band": (2833, 1666, 500), "loss": (5, 10, 20), "disfluency": (1, 2, 4)}
TRAINED_BY = {("instruct", "semantic"): {"semantic"}, ("sqa", "F1"): {"task"}, ("s2tt", "chrF"): {"task"},
              **{("instruct", metric): {"logp", "token"} for metric in ("log π_T", "wins", "LC wins")},
              **{("instruct", metric): {"judge"} for metric in ("judged", "LC judged")}}


# ------------------------------------------------------------------------------------------------------ metrics
def is_contained(reference, answer):
    """The reference's words stand in the answer as one contiguous run: "Ca" does not match "because"."""
    wanted, said = (common.normalise(text).split() for text in (reference, answer))
    return bool(wanted) and any(said[i:i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def tokenizer(item):
    """sacrebleu's tokenizer for the language of an item's reference."""
    return {"Chinese": "zh", "Japanese": "char"}.get(item.get("language"), "13a")


def corpus_statistics(metric, answers, references):
    """sacrebleu's sufficient statistics, a row per item: their sums over items give the corpus score."""
    most = max(map(len, references))                      # sacrebleu wants as many of every item: the first again changes no score
    columns = [list(column) for column in zip(*([*own, *own[:1] * (most - len(own))] for own in references))]
    return np.array(metric._extract_corpus_statistics(answers, columns), float)


def bleu(sums, _):
    """sacrebleu's corpus BLEU of its summed statistics (..., 10), for many resamples at once: smoothing "exp"."""
    length, wanted, correct, total = np.split(np.asarray(sums, float), [1, 2, 6], -1)
    halvings = 2.0 ** np.cumsum(correct == 0, -1)         # each order without a match counts half of the one before
    precision = np.where(correct > 0, correct, 1 / halvings) / np.maximum(total, 1)        # (..., 4)
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(length, 1)))[..., 0]
    return np.where((correct.sum(-1) > 0) & (total.min(-1) > 0), 100 * brevity * np.exp(np.log(precision).mean(-1)), 0.0)


def chrf(sums, _):
    """sacrebleu's corpus chrF (beta 2) of its summed statistics (..., 18), for many resamples at once."""
    said, wanted, match = np.moveaxis(np.reshape(sums, (*np.shape(sums)[:-1], 6, 3)), -1, 0)   # (..., 6) each
    used = (said > 0) & (wanted > 0)
    precision, recall = (np.where(used, match / np.maximum(of, 1), 0.0).sum(-1) / np.maximum(used.sum(-1), 1) for of in (said, wanted))
    return 100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-16)


def signature(metric):
    metric.corpus_score(["."], [["."]])                   # sacrebleu knows it after a first score
    return metric.get_signature()


def mean(sums, n):
    return sums[..., 0] / n


@torch.inference_mode()
def teacher_scores(model, teacher, items, answers):
    """Mean log pi_T of each `instruct` answer's tokens given the gold words (None elsewhere): a judge that is no default
    reward of `rba`."""
    scores, judged = [None] * len(items), [i for i, item in enumerate(items) if teacher and item["task"] == "instruct"]
    with common.autocast(model.llm):
        for at in range(0, len(judged), 16):
            chosen = judged[at:at + 16]
            ids = [model.answer_ids(answers[i][0]) for i in chosen]
            flat = common.token_log_probs(*teacher.answer_states([items[i] for i in chosen], ids))
            for i, part in zip(chosen, flat.split([len(y) for y in ids])):
                scores[i] = float(part.mean())
    return scores


class WordLlama:
    """An encoder that is no reward: the mean of static token vectors, which were distilled from the input embeddings of large LLMs
    (github.com/dleemiller/WordLlama, 256 values)."""

    def __init__(self):
        from safetensors.torch import load_file
        from transformers import PreTrainedTokenizerFast
        with common.loading("wordllama", "sentence embedder") as path:
            self.table = load_file(f"{path}/model.safetensors")["embedding.weight"].float()    # (32000, 256)
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{path}/tokenizer.json")

    def __call__(self, texts):
        """list of N strings -> (N, 256) float32, rows of length 1 (0 for a text without tokens)."""
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return torch.nn.functional.normalize(torch.stack([self.table[row].sum(0) for row in ids]), dim=-1)


def remembered(encode):
    """The same encoder, which encodes a text once: references are every system's, and some items stand in two tables."""
    held = {}

    def rows(texts):
        new = [text for text in dict.fromkeys(texts) if text not in held]
        held.update(zip(new, encode(new) if new else ()))
        return torch.stack([held[text] for text in texts])
    return rows


QUESTION = ("Which of two answers to a spoken request is better: more helpful, more correct, more to the point? Reply with the letter A or B "
            "alone.\n\nRequest: {text}\n\nAnswer A: {a}\n\nAnswer B: {b}")


class ServedJudge(common.Served):
    """An LLM behind an OpenAI-compatible URL, asked in both orders."""

    def prefers(self, item, first, second):
        """1 where `first` is better, 0 where `second` is, 0.5 where the reply names neither."""
        question = QUESTION.format(text=item["text"] + (f"\n{item['prompt']}" if item["prompt"] else ""), a=first, b=second)
        said = str(self.call("chat/completions", lambda reply: reply["choices"][0]["message"]["content"], model=self.model,
                             messages=[dict(role="user", content=question)], temperature=0, max_tokens=8))
        letter = (re.match(r"\W*(?:[Aa]nswer\W+)?([AB])(?=\W*$|[^\w\s]|\s*\n| is\b)", said)   # it begins with its choice, or ends with it
                  or re.search(r"\b([AB])\W*$", said))
        return {"A": 1.0, "B": 0.0}[letter[1]] if letter else 0.5

    def __call__(self, items, answers, others):
        """-> N preferences for `answers`: the mean of both orders."""
        with ThreadPoolExecutor(8) as pool:
            turns = [pool.map(self.prefers, items, *pair) for pair in ((answers, others), (others, answers))]
            return [(a + 1 - b) / 2 for a, b in zip(*turns)]


class RewardJudge:
    """A reward model: the higher reward wins, equal ones are half a win each."""

    def __init__(self, name, device):
        self.name, self.rewards = name, common.RewardModel(name, device)

    def __call__(self, items, answers, others):
        return [(1 + np.sign(a - b)) / 2 for a, b in zip(self.rewards(items, answers), self.rewards(items, others))]


def compare_answers(judge, path, items, key, answers, others):
    """The judge's preferences for `answers` over `others` on the `instruct` items (None elsewhere), kept line by line in `path`."""
    out = [None] * len(items)
    if path.exists():                                     # what is of other answers, or a kill cut, goes
        fields = dict(at=int, key=str, prefers=float)
        held = [row for row in common.read_jsonl(path, lambda row: common.check_fields(row, fields), "04_evaluate.py", torn=True) if row["key"] == key]
        common.write_jsonl(path, held)
        for row in held:
            out[row["at"]] = row["prefers"]
    missing = [i for i, item in enumerate(items) if item["task"] == "instruct" and out[i] is None]
    for at in tqdm(range(0, len(missing), 16), desc=f"judge {path.stem}", unit="batch", leave=False):
        chosen = missing[at:at + 16]
        for i, value in zip(chosen, judge(*([rows[i] for i in chosen] for rows in (items, answers, others)))):
            out[i] = value
            common.append_jsonl(path, dict(at=i, key=key, prefers=value))
    return out


def measure(items, answers, heard, scores, encoders, preferences=None):
    """{(task, metric): (statistics (N, C) per item, aggregate)} of one system's answers [(text, tokens, ended)].
    encoders: {metric: list of N strings -> (N, d) rows of length 1}."""
    out = {}
    for task in TASKS:
        chosen = [i for i, item in enumerate(items) if item["task"] == task]
        if not chosen:
            continue
        said, gold = [answers[i][0] for i in chosen], [items[i]["reference"] for i in chosen]
        if task == "sqa":
            pairs = list(zip(gold, said))
            per_item = {"accuracy": [100 * any(is_contained(r, a) for r in refs) for refs, a in pairs],
                        SOON: [100 * any(is_contained(r, " ".join(a.split()[:16])) for r in refs) for refs, a in pairs],
                        "exact match": [100 * any(common.has_words(r) and common.normalise(r) == common.normalise(a) for r in refs)
                                        for refs, a in pairs],
                        "F1": [100 * max(common.token_f1(a, r) for r in refs) for refs, a in pairs]}
        elif task == "instruct":
            per_item = {"chrF": [sacrebleu.sentence_chrf(a, refs).score for refs, a in zip(gold, said)]} if all(gold) else {}
            for name, encode in encoders.items() if all(gold) else ():   # without references a judge alone compares
                both = encode([*said, *(refs[0] for refs in gold)])
                per_item[name] = (100 * (both[:len(said)] * both[len(said):]).sum(-1)).tolist()
            if scores[chosen[0]] is not None:
                per_item["log π_T"] = [scores[i] for i in chosen]
            if preferences:
                per_item["judged"] = [100 * preferences[i] for i in chosen]
        else:
            per_item = {}
            for name, metric, score in (("BLEU", sacrebleu.BLEU(tokenize=tokenizer(items[chosen[0]])), bleu), ("chrF", sacrebleu.CHRF(), chrf)):
                out[task, name] = corpus_statistics(metric, said, gold), score
        per_item["tokens"] = [answers[i][1] for i in chosen]
        for name, values in per_item.items():
            out[task, name] = np.array(values, float)[:, None], mean
        if heard:
            edits = [common.word_errors(items[i]["text"], heard[i]) for i in chosen]
            out[task, "WER"] = np.array(edits, float), lambda sums, n: 100 * sums[..., 0] / sums[..., 1]
    return out


def length_controlled(wins, own, base, counts=None, prior=-1.6, weight=1.0):
    """Win rate in % at equal lengths: logistic regression of the preference on [1, tanh((len_base - len_own) / std)] with a weak Gaussian
    prior on the length coefficient, as official fits have -1.5 to -2.1; then the length term is left out. After AlpacaEval 2 (arXiv
    2404.04475), which adds instruction difficulty and gamed baselines: not the official number.

    wins (N,) in 0 to 1, lengths own and base (N,); counts (R, N) how often each resample holds each item -> (R,).
    """
    counts = np.ones((1, len(wins))) if counts is None else counts
    gap = np.asarray(base, float) - own
    x = np.tanh(gap / gap.std()) if gap.std() > 0 else np.zeros(len(gap))                  # (N,)
    theta, phi = np.zeros(len(counts)), np.full(len(counts), prior)                        # (R,)
    for _ in range(25):                                   # Newton's method, for all resamples at once
        p = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * x)))                         # (R, N)
        rest, curve = counts * (wins - p), counts * p * (1 - p)
        g0, g1 = rest.sum(1) - 0.01 * theta, rest @ x - weight * (phi - prior)             # 0.01: where all are won
        h00, h01, h11 = curve.sum(1) + 0.01, curve @ x, curve @ x ** 2 + weight
        det = h00 * h11 - h01 ** 2
        step0, step1 = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        theta, phi = theta + np.clip(step0, -2, 2), phi + np.clip(step1, -2, 2)
        if max(np.abs(step0).max(), np.abs(step1).max()) < 1e-8:
            break
    return 100 / (1 + np.exp(-theta))


def paired_tests(items, answers, base="sft"):
    """sacrebleu's own paired bootstrap test of every system's translations against `base`: {system: {"BLEU": p, "chrF": p}}.
    answers: {system: list of N strings}. Equal scores have p = 1: sacrebleu gives them its smallest."""
    from sacrebleu.significance import PairedTest
    chosen = [i for i, item in enumerate(items) if item["task"] == "s2tt"]
    named = [(system, [answers[system][i] for i in chosen]) for system in sorted(answers, key=lambda system: system != base)]
    if len(chosen) < 2 or base not in answers or len(named) < 2:
        return {}
    metrics = {"BLEU": sacrebleu.BLEU(tokenize=tokenizer(items[chosen[0]])), "chrF": sacrebleu.CHRF()}
    _, found = PairedTest(named, metrics, [[items[i]["reference"][0] for i in chosen]], test_type="bs", n_samples=1000)()
    columns = [found[name] for name in found if name != "System"]
    return {system: {metric: float(column[at].p_value) if column[at].score != column[0].score else 1.0 for metric, column in zip(metrics, columns)}
            for at, (system, _) in enumerate(named) if at}


def over_seeds(runs, system):
    """The metrics of one system's training seeds (list of what `measure` gives) -> the same of their mean: statistics side by side
    in columns, so that all seeds are resampled with the same items. Resamples draw the seeds too, each system its own, so that an
    interval holds the spread of the training as far as a few seeds can show it."""
    if len(runs) == 1:
        return runs[0]
    out = {}
    for key, (_, aggregate) in runs[0].items():
        if any(key not in run for run in runs):
            continue
        def score(sums, n, aggregate=aggregate):
            scores = np.stack([aggregate(part, n) for part in np.split(sums, len(runs), -1)], -1)   # (S,) or (R, S)
            if scores.ndim == 1:
                return scores.mean()
            s, seeds = len(runs), np.random.default_rng(common.derive_seed("seeds", system))
            drawn = (seeds.multinomial(s, np.full(s, 1 / s), len(scores)) / s * scores).sum(-1)
            return scores.mean(-1) + (drawn - scores.mean(-1)) * (s / (s - 1)) ** 0.5      # s of s drawn vary by (s - 1) / s of what s seeds do
        out[key] = np.concatenate([run[key][0] for run in runs], 1), score
    return out


def trained_on(history, judge_rewarded):
    """What a checkpoint's stages were trained on: rewards by name, `token` for log π_T, `judge` where its reward model now judges."""
    names = {name for past in history for name in past.get("rewards", {})}
    names |= {"token" for past in history if past.get("token_reward") or past.get("objective") == "kd"}
    return sorted(names | ({"judge"} if judge_rewarded and "rm" in names else set()))


# ------------------------------------------------------------------------------------------------------ systems
def load_system(model, system, work):
    """Put a system's weights into the model; `text`, `cascade` and `init` are the untrained one."""
    return model.load(work / f"{system}.pt" if system not in UNTRAINED else "none")


def answer_all(model, system, items, heard, max_new, batch_size=64):
    """Greedy answers of a loaded system, batched by prompt length: list of (answer, tokens, ended) in the items' order.
    `heard`: what Whisper made of the speech."""
    as_text, tokenizer = system in ("text", "cascade"), model.tokenizer
    requests = [item["prompt"] for item in items]
    around = {p: sum(map(len, common.chat_parts(tokenizer, p)[:2])) for p in set(requests)}
    texts = [row["text"] for row in (items if system == "text" else heard)]
    lengths = [around[p] + len(tokenizer(text, add_special_tokens=False).input_ids) for p, text in zip(requests, texts)]
    answers = [None] * len(items)
    with torch.inference_mode(), tqdm(total=len(items), desc=f"answer {system}", unit="item", leave=False) as bar, (
            model.as_text_llm() if as_text else contextlib.nullcontext(model.llm)) as llm:
        for chosen in common.by_length(lengths, batch_size):
            asked = [requests[i] for i in chosen]
            prompts = (common.text_prompts(tokenizer, llm, [texts[i] for i in chosen], asked) if as_text else
                       model.speech_prompts([heard[i] for i in chosen], asked))
            with common.autocast(model.llm):
                replies = common.sample(llm, prompts, model.end_id, max_new)
            for i, [(ids, ended)] in zip(chosen, replies):
                answers[i] = (tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), ended)
            bar.update(len(chosen))
    return answers


def available(args):
    """Systems to run, in the tables' order; UserError for one that has no checkpoint."""
    if args.ask and not any(args.work.glob("*.pt")):      # right after the installation
        print(f"{args.work} holds no checkpoint: the shipped ones (preset small, README) answer")
        args.work = Path(__file__).resolve().with_name("assets")
    held = ["text", "cascade"] + [name for name in CHECKPOINTS if (args.work / f"{name}.pt").exists()]
    held += sorted(p.stem for p in args.work.glob("*.pt") if p.stem not in held and "." not in p.stem)
    chosen = [*dict.fromkeys(args.systems.split(","))] if args.systems else held
    missing = [name for name in chosen if name not in UNTRAINED and not (args.work / f"{name}.pt").exists()]
    if missing:
        raise UserError(f"--systems {missing[0]}: no {args.work / missing[0]}.pt; there are {', '.join(held)}")
    if args.ask and ({"data", "conditions"} & args.given.keys() or chosen == ["text"]):
        raise UserError("--ask answers one recording: without --data and --conditions, and not by text alone, which hears nothing")
    if args.systems or len(held) > 2:
        return chosen
    raise UserError(f"{args.work}: no checkpoint yet; run 02_sft_warmup.py first (same --work)")


def ask(args, systems):
    """Every system's answer to one recording."""
    wave = common.read_audio(args.ask)
    model = common.load_speechlm(vars(args))
    heard = model.listen([wave])
    print(f"{args.ask}: {len(wave) / common.RATE:.1f} s; Whisper hears: {heard[0]['text']}")
    for system in systems:
        if system != "text":                              # nobody typed the words
            load_system(model, system, args.work)
            [(answer, _, ended)] = answer_all(model, system, [dict(prompt="")], heard, args.max_new)
            print(f"{system:>8} | {answer}{'' if ended else ' …'}")


# ------------------------------------------------------------------------------------------------------- report
def minus(own, theirs):
    """A system's (statistics (N, C), aggregate) minus another's -> the same of the difference, columns side by side: paired over items."""
    c = own[0].shape[1]
    return np.concatenate([own[0], theirs[0]], 1), lambda sums, n: own[1](sums[..., :c], n) - theirs[1](sums[..., c:], n)


def excludes_zero(statistics, low, high):
    """Of one item there is no interval."""
    return len(statistics) > 1 and bool(low > 0 or high < 0)


def compare(measured, base="sft", seed=0):
    """{condition: {system: [a seed's statistics, ...]}} -> rows: value, interval, paired difference to `base`, gap recovered."""
    rows = []
    for condition, systems in measured.items():
        systems, judged = {system: [dict(run) for run in runs] for system, runs in systems.items()}, ("instruct", "log π_T")
        against = [run[judged][0] for run in systems.get(base, []) if judged in run]       # of base's seeds, (N, 1) each
        for system, run in ((system, run) for system, runs in systems.items() for run in runs):
            if system != base and judged in run and against:   # win rate by this judge over the seeds of base, ties one half
                run["instruct", "wins"] = np.mean([50 * (1 + np.sign(run[judged][0] - other)) for other in against], 0), mean
        one = {system: dict(over_seeds(runs, system)) for system, runs in systems.items()}
        for system, metrics in one.items():
            for (task, metric), (statistics, aggregate) in metrics.items():
                value, low, high = common.bootstrap(statistics, aggregate, seed=seed)
                row = dict(condition=condition, system=system, task=task, metric=metric, n=len(statistics), value=value,
                           low=low, high=high)
                if len(systems[system]) > 1 and (task, metric) in systems[system][0]:
                    seeds = [run[task, metric] for run in systems[system]]
                    row["seeds"] = [float(score(own.sum(0), len(own))) for own, score in seeds]
                other = one.get(base, {}).get((task, metric))
                if other is not None and system != base:
                    columns, difference = minus((statistics, aggregate), other)
                    d = common.bootstrap(columns, difference, seed=seed)
                    row |= dict(difference=d[0], difference_low=d[1], difference_high=d[2], separable=excludes_zero(statistics, *d[1:]))
                    text = one.get("text", {}).get((task, metric))
                    if PRIMARY.get(task) == metric and system != "text" and text is not None:
                        (gaps, gap), z = minus(text, other), columns.shape[1]
                        if len(statistics) > 1 and common.bootstrap(gaps, gap, seed=seed)[1] > 0:
                            def recovered(s, n, gap=gap, difference=difference, z=z):
                                return difference(s[..., :z], n) / gap(s[..., z:], n)
                            g = common.bootstrap(np.concatenate([columns, gaps], 1), recovered, seed=seed)
                            row |= dict(gap_recovered=g[0], gap_recovered_low=g[1], gap_recovered_high=g[2])
                rows.append(row)
                if metric in ("wins", "judged"):          # once more with length taken out
                    wins, lengths = statistics.mean(1) / 100, [own[task, "tokens"][0].mean(1) for own in (metrics, one[base])]
                    low, high = np.percentile(length_controlled(wins, *lengths, common.draws(len(wins), 2000, seed)), [2.5, 97.5])
                    rows.append(dict(condition=condition, system=system, task=task, metric=f"LC {metric}", n=len(wins), low=float(low),
                                     high=float(high), value=float(length_controlled(wins, *lengths)[0])))
    return rows


def between(measured, seed=0):
    """The primary metrics of every system but `text` against every other: rows of condition, metric, system, base, difference, low, high."""
    rows = []
    for condition, systems in measured.items():
        one = {system: over_seeds(runs, system) for system, runs in systems.items() if system != "text"}
        for key in PRIMARY.items():
            for (a, own), (b, theirs) in itertools.permutations([(system, metrics[key]) for system, metrics in one.items() if key in metrics], 2):
                d = common.bootstrap(*minus(own, theirs), seed=seed)
                rows.append(dict(condition=condition, metric=" ".join(key), system=a, base=b, difference=d[0], low=d[1], high=d[2],
                                 separable=excludes_zero(own[0], *d[1:])))
    return rows


def between_table(rows, lines):
    """What `between` gives as a table for each condition, appended to `lines`; the intervals are in results.json."""
    for condition in dict.fromkeys(row["condition"] for row in rows):
        found = {(r["system"], r["base"], r["metric"]): r for r in rows if r["condition"] == condition}
        systems, metrics = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 2))
        lines += [f"\n### {condition}: row minus column, {' / '.join(metrics)}\n", f"| | {' | '.join(systems)} |", "|---" * (len(systems) + 1) + "|"]
        for a in systems:
            pairs = [[found.get((a, b, metric)) for metric in metrics] for b in systems]
            cells = [" / ".join(f"{r['difference']:+.1f}{'*' * r['separable']}" if r else "–" for r in pair) for pair in pairs]
            lines.append(f"| {a} | {' | '.join('' if a == b else shown for b, shown in zip(systems, cells))} |")


def cell(row, dagger):
    if row is None:
        return "–"
    seeds = row.get("seeds", [0])
    spread = f" ({len(seeds)} seeds {min(seeds):.1f} to {max(seeds):.1f})" if max(seeds) > min(seeds) else ""
    return f"{row['value']:.1f}{'*' * row.get('separable', False)}{'†' if dagger else ''} [{row['low']:.1f}, {row['high']:.1f}]{spread}"


def table(rows, trained, lines):
    """Markdown tables of the first four conditions by task, appended to `lines`; {system: what it was trained on} gives the daggers."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    for condition in [c for c in conditions if not c.endswith(UNHEARD)][:4] + [c for c in conditions if c.endswith(UNHEARD)]:
        found = {(r["system"], r["task"], r["metric"]): r for r in rows if r["condition"] == condition}
        systems = list(dict.fromkeys(system for system, _, _ in found))
        for task in (t for t in TASKS if any(t == own for _, own, _ in found)):
            metrics = list(dict.fromkeys(m for _, t, m in found if t == task and m != "tokens"))
            count = next(r["n"] for (_, t, _), r in found.items() if t == task)
            lines += [f"\n### {condition}: {task} ({count} items)\n",
                      f"| system | {' | '.join(NAMES.get(m, m) for m in metrics)} | tokens |", "|---" * (len(metrics) + 2) + "|"]
            for system in systems:
                cells = [cell(found.get((system, task, m)), TRAINED_BY.get((task, m), set()) & set(trained.get(system, ())))
                         for m in metrics]
                lines.append(f"| {system} | {' | '.join(cells)} | {found[system, task, 'tokens']['value']:.0f} |")
        lines += ["\n| difference to sft | " + " | ".join(f"{t} {m}" for t, m in PRIMARY.items()) + " | gap recovered |", "|---|---|---|---|"]
        for system in systems:
            own = [found.get((system, t, m), {}) for t, m in PRIMARY.items()]
            if not any("difference" in r for r in own):
                continue
            cells = [f"{r['difference']:+.1f}{'*' * r['separable']} [{r['difference_low']:+.1f}, {r['difference_high']:+.1f}]"
                     if "difference" in r else "–" for r in own]
            gaps = [f"{r['task']} {r['gap_recovered']:+.2f} [{r['gap_recovered_low']:+.2f}, {r['gap_recovered_high']:+.2f}]"
                    for r in own if "gap_recovered" in r]
            lines.append(f"| {system} | " + " | ".join(cells) + f" | {', '.join(gaps) or '–'} |")


def robustness_table(rows, lines):
    """Each primary metric by condition, with its change against clean speech and Whisper's WER beside it, appended to `lines`."""
    found = {(r["condition"], r["system"], r["task"], r["metric"]): r for r in rows if not r["condition"].endswith(UNHEARD)}
    conditions, systems = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    if len(conditions) < 3:
        return
    for task, metric in SHOWN:
        own = [system for system in systems if ("clean", system, task, metric) in found]
        if not own:
            continue
        lines += [f"\n### {task} {metric} by condition, and its change against clean speech in %\n",
                  f"| condition | WER of Whisper | {' | '.join(own)} |", "|---" * (len(own) + 2) + "|"]
        for condition in conditions:
            wer = next((r["value"] for (c, _, t, m), r in found.items() if (c, t, m) == (condition, task, "WER")), None)
            cells = []
            for system in own:
                row, clean = found[condition, system, task, metric], found["clean", system, task, metric]["value"]
                change = f" ({100 * (row['value'] - clean) / clean:+.0f} %)" if condition != "clean" and clean else ""
                cells.append(f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]{change}")
            lines.append(f"| {condition} | {'–' if wer is None else f'{wer:.1f}'} | {' | '.join(cells)} |")


def plot_robustness(rows, path):
    """Small multiples: a column per kind of condition, a row per primary metric, a line with its interval band per system."""
    kinds = [k for k in SEVERITIES if any(row["condition"].startswith(k + ":") for row in rows)]
    if "clean" not in {row["condition"] for row in rows} or not kinds:
        return
    pyplot = common.pyplot()
    found = {(r["condition"], r["system"], r["task"], r["metric"]): r for r in rows}
    systems = list(dict.fromkeys(row["system"] for row in rows if row["system"] != "text"))
    panels = [(t, m) for t, m in SHOWN if any(("clean", system, t, m) in found for system in systems)]
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), len(kinds), figsize=(2.4 * len(kinds) + 1, 2.5 * len(panels) + 0.6), squeeze=False, sharey="row")
    for line, (task, metric) in zip(axes, panels):
        for axis, kind in zip(line, kinds):
            own = ["clean", *dict.fromkeys(row["condition"] for row in rows if re.fullmatch(kind + r":[\d.-]+", row["condition"]))]
            for at, system in enumerate(systems):
                points = [found[condition, system, task, metric] for condition in own]
                style = dict(color=str(0.7 * at / max(1, len(systems) - 1)), ls=("-", "--", ":", "-.")[at % 4], marker="osv^Dx*"[at % 7], ms=4)
                axis.plot(range(len(own)), [p["value"] for p in points], label=system, **style)
                axis.fill_between(range(len(own)), [p["low"] for p in points], [p["high"] for p in points], color=style["color"], alpha=0.08, lw=0)
            axis.set_xticks(range(len(own)), ["clean", *(c.partition(":")[2] for c in own[1:])])
            axis.set_title(f"{kind} ({common.CONDITIONS[kind][3].lower()})", fontsize=9)
        line[0].set_ylabel(f"{task}: {metric}")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    common.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def plot(rows, path):
    """Primary metrics with their intervals, a panel per task, at most four conditions side by side; legible in black and white."""
    pyplot = common.pyplot()
    conditions = [c for c in dict.fromkeys(row["condition"] for row in rows) if not c.endswith(UNHEARD)][:4]
    panels = [(t, m) for t, m in SHOWN if any((r["task"], r["metric"]) == (t, m) for r in rows)]
    if not panels:                                        # instruct without references: a judge's table alone
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (task, metric) in zip(axes[0], panels):
        for at, condition in enumerate(conditions):
            own = [r for r in rows if (r["task"], r["metric"], r["condition"]) == (task, metric, condition)]
            width = 0.8 / len(conditions)
            x = np.arange(len(own)) + width * (at + 0.5) - 0.4
            values = np.array([r["value"] for r in own])
            errors = np.abs(np.array([[r["low"], r["high"]] for r in own]).T - values)
            axis.bar(x, values, width, yerr=errors, capsize=2, color=str(0.4 + 0.5 * at / len(conditions)), edgecolor="black", label=condition,
                     hatch=("", "//", "..", "xx")[at % 4], error_kw=dict(lw=1))
            axis.set_xticks(np.arange(len(own)), [r["system"] for r in own], rotation=40, ha="right")
        axis.set(title=f"{task}: {metric}" + (" (agreement with the teacher)" if task == "s2tt" else ""), ylim=(0, None))
    axes[0][0].legend(fontsize=8)
    figure.suptitle("held-out items before the WER bound, 95 % bootstrap intervals")
    figure.tight_layout()
    common.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)


def report(held, path):
    """results.json's content -> `path`.md and .png; prints the table."""
    counts = ", ".join(f"{n} {task}" for task, n in held["items"].items())
    where = f"items of `{held['source']}`" if held["source"] else "held-out items before the WER bound, on speech that this run synthesized"
    lines = [f"# Results\n\nPreset `{held['preset']}`, seed {held['seed']}; {counts} {where}; teacher `{held['teacher']}`. 95 % bootstrap "
             "intervals over items."]
    if held["judge"]:
        lines.append(f"\nJudge: `{held['judge']}`, which reads the gold words and both answers.")
    if held["broken"]:
        lines.append(f"\n{len(held['broken'])} items can't be heard and count as wrong: {', '.join(held['broken'])}.")
    table(held["rows"], held["rewards"], lines)
    if held["paired"]:
        lines.append(f"\nTranslation, {held['conditions'][0]}, p of sacrebleu's paired bootstrap test against sft (one tail): " + "; ".join(
            f"{system} " + ", ".join(f"{metric} {p:.3f}" for metric, p in own.items()) for system, own in held["paired"].items()) + ".")
    between_table(held.get("between", []), lines)
    robustness_table(held["rows"], lines)
    lines += ["\n\\* the 95 % interval of the paired difference to `sft` excludes 0. † the system was trained on this metric (reward). `text` reads the gold words, `cascade` Whisper's transcript. "
              "References of 01's items are the teacher's own: sqa and instruct measure agreement with it (even `text`, which may share its "
              "weights, differs where rounding parts two greedy paths), s2tt too, whatever its translations are worth. BLEU: "
              f"`{signature(sacrebleu.BLEU(tokenize=held['tokenizer']))}`, chrF: `{signature(sacrebleu.CHRF())}`."]
    common.write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    plot(held["rows"], path.with_suffix(".png"))
    plot_robustness(held["rows"], path.with_name(f"{path.stem}-conditions.png"))
    print("\n".join(lines))
    print(f"\n{path.with_suffix('')}.md, .json, .png")


def main():
    args = common.parse_args(__doc__, FLAGS)
    if args.draw:
        return draw(Path(args.draw))
    systems, conditions = available(args), [*dict.fromkeys(args.conditions.split(","))]
    if conditions == ["all"]:
        conditions = ["clean", *(f"{kind}:{amount}" for kind, amounts in SEVERITIES.items() for amount in amounts)]
    for condition in conditions:
        common.parse_condition(condition)
    if args.judge and not args.ask and "sft" not in systems:
        raise UserError("--judge compares with sft, which is not among the systems: add it to --systems")
    histories = {system: common.load_checkpoint(args.work / f"{system}.pt", "rba-speechlm-1").get("history", [])
                 for system in systems if system not in UNTRAINED}     # before the models are loaded: a file may be damaged
    if args.ask:
        ask(args, systems)
        return
    for system, history in histories.items():             # seeds of one system, or two systems with like names?
        first = next(name for name in histories if common.without_seed(name) == common.without_seed(system))
        own, other = ({key: value for key, value in past[-1].items() if key not in ("seed", "init", "data")} if past else {}
                      for past in (history, histories[first]))
        differing = [key for key in own.keys() | other.keys() if own.get(key) != other.get(key)]
        if differing:
            raise UserError(f"{system}.pt is no other seed of {first}.pt, as {differing[0]} differs ({own.get(differing[0])}, {other.get(differing[0])}); "
                            "rename it, or choose with --systems")
    rank, world, device = common.setup_processes()
    if rank == 0:
        common.claim(args.work / "results.json")
        judge = args.judge and (ServedJudge(args.judge) if common.is_url(args.judge) else RewardJudge(args.judge, device))
    if args.data:
        source, folder, items, broken = common.read_set(args.data, args.language)
    else:
        source, items, broken = args.work / "data" / "test_all.jsonl", common.read_items(args.work, "test_all"), {}
        folder = source.parent
    if broken and rank == 0:
        tqdm.write(f"{len(broken)} of {len(items)} items can't be heard and count as wrong:")
        for reason in broken.values():
            tqdm.write(f"  {reason}")
    languages = {item["language"] for item in items if item["task"] == "s2tt"}
    if len(languages) > 1:
        raise UserError(f"{source}: translations into {' and '.join(sorted(languages))}; give a file for each language")
    inside = source.resolve().parent == (args.work / "data").resolve()
    name = ("" if inside else f"{source.resolve().parent.name}-") + source.stem            # many sets have a file test.tsv
    name += "".join(f"-{language}" for language in languages if ":" in (args.data or ""))  # and one file may have many targets
    model = common.load_speechlm(vars(args), device)
    encoders, teacher = dict(similarity=remembered(WordLlama()), semantic=remembered(common.Embedder(args.embedder, device))), None
    try:
        teacher = common.Teacher(model, args.teacher)
    except UserError as error:                            # log pi_T and the wins by it are left out
        tqdm.write(f"no log π_T: {error}")
    if not all(common.gather([teacher is not None])):     # of all processes alike
        teacher = None
    data_key = common.digest(items)
    window = args.window if inside and all(item.get("length", 0) <= args.max_seconds for item in items) else 30.0
    measured, trained = {}, {common.without_seed(system): trained_on(history, args.judge == args.reward_model) for system, history in histories.items()}
    sound = [i for i, item in enumerate(items) if item["id"] not in broken]
    unheard_row = dict(text="", ids=[], states=torch.zeros(0, model.width).half())
    heard = {}
    for condition in conditions:
        heard[condition] = [unheard_row] * len(items)
        for i, row in zip(sound, common.listen_to_split(model, args.work, source, [items[i] for i in sound], condition, window, rank, world, folder)):
            heard[condition][i] = row
    sounds = {condition: digest_of_sounds(rows) for condition, rows in heard.items()}
    # ---- answers: one file per system and condition, kept as long as data and checkpoint are the same
    work = [(condition, system) for condition in conditions for system in systems
            if not (system == "text" and condition != conditions[0])]
    for at, (condition, system) in enumerate(tqdm(work, desc="systems", unit="system", disable=rank > 0)):
        checkpoint = args.work / f"{system}.pt"
        key = " ".join(map(str, (data_key, sounds[condition] if system != "text" else "", common.fingerprint(checkpoint if checkpoint.exists() else "none"), args.student,
                                 args.teacher, bool(teacher), args.whisper, args.max_new, window, common.SYSTEM)))
        path = answers_path(args.work, name, system, condition)
        held = read_answers(path) if path.exists() else []
        if at % world == rank and [row.get("key") for row in held] != [key] * len(items):
            load_system(model, system, args.work)
            able = range(len(items)) if system == "text" else sound
            answers = [("", 0, False)] * len(items)
            for i, answer in zip(able, answer_all(model, system, [items[i] for i in able], [heard[condition][i] for i in able], args.max_new)):
                answers[i] = answer
            scores = teacher_scores(model, teacher, items, answers)
            common.write_jsonl(path, [dict(id=item["id"], key=key, system=system, condition=condition, answer=answer,
                                           tokens=tokens, ended=ended, score=scores[i])
                                      for i, (item, (answer, tokens, ended)) in enumerate(zip(items, answers))])
    common.barrier()
    if rank:
        return
    # ---- metrics, intervals, table, plot; once more for the items in voices that train does not have
    everything = range(len(items))
    held = {(condition, system): read_answers(answers_path(args.work, name, system, condition)) for condition, system in work}
    unheard = common.parse_voices(args.unheard_voices)
    parts = {"": everything, UNHEARD: [i for i in everything if items[i].get("voice") in unheard]}
    for condition, system in work:
        rows, base, preferences = held[condition, system], held.get((condition, "sft")), None
        if judge and base and common.without_seed(system) != "sft":
            key = common.digest([judge.name, QUESTION, data_key, [[row["answer"] for row in side] for side in (rows, base)]])
            path = answers_path(args.work, name, system, condition).with_suffix(".judged.jsonl")
            preferences = compare_answers(judge, path, items, key, *([row["answer"] for row in side] for side in (rows, base)))
        for part, chosen in parts.items():
            if chosen and (not part or condition == conditions[0]):
                measured.setdefault(condition + part, {}).setdefault(common.without_seed(system), []).append(measure(
                    [items[i] for i in chosen], [(rows[i]["answer"], rows[i]["tokens"], rows[i]["ended"]) for i in chosen],
                    [heard[condition][i]["text"] for i in chosen] if system != "text" else None,
                    [rows[i]["score"] for i in chosen], encoders, [preferences[i] for i in chosen] if preferences else None))
    said = {system: [row["answer"] for row in held[conditions[0], system]] for system in systems}
    for condition in conditions[1:]:                      # text hears nothing: the same in every condition, but for whom it is compared with
        if "text" in systems:
            [text] = measured[conditions[0]]["text"]
            measured[condition] = {"text": [{key: value for key, value in text.items() if key[1] != "judged"}]} | measured.get(condition, {})
    path = args.work / ("results.json" if not args.data else f"results-{name}.json")
    out = dict(preset=args.preset, seed=args.seed, teacher=args.teacher, data=data_key, items=Counter(item["task"] for item in items),
                paired=paired_tests(items, said), source=args.data or "", broken=broken, judge=judge.name if judge else "", conditions=conditions,
                tokenizer=next((tokenizer(item) for item in items if item["task"] == "s2tt"), "13a"),
                rows=compare(measured, seed=args.seed), between=between({c: measured[c] for c in conditions[:4]}, args.seed), rewards=trained, history=histories) | common.environment()
    common.write_json(path, out)
    report(out, path)


def draw(path):
    """Table and plot of a results.json once more."""
    try:
        held = json.loads(path.read_text())
        report(held, path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--draw {path}: no results.json of this script ({type(error).__name__}: {str(error)[:80]}); run 04_evaluate.py "
                        "to make one") from None


def digest_of_sounds(rows):
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row["ids"]).encode())
        digest.update(row["states"].contiguous().view(torch.int16).numpy())
    return digest.hexdigest()[:16]


def answers_path(work, name, system, condition):
    return work / "answers" / name / f"{system}.{condition.replace(':', '-')}.jsonl"


def read_answers(path):
    fields = dict(id=str, key=str, answer=str, tokens=int, ended=bool)
    return common.read_jsonl(path, lambda row: {"score": None} | common.check_fields(row, fields), "04_evaluate.py")


if __name__ == "__main__":
    common.run(main)
