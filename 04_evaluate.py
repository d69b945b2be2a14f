"""Stage 4: every system on the same held-out items, clean, in unheard voices, and under acoustic conditions.

[paper] instruction following, spoken question answering and speech-to-text translation, against distillation.
[ours] the protocol:
- Systems: `text` (LoRA off, gold words: the teacher where the two LLMs are one), `cascade` (Whisper's transcript, same
  LLM), `sft`, `sft+`, `kd`, `opd`, `rba`, `rba+opd`: those that DIR holds; any other NAME.pt likewise.
- `sqa`: an answer is right when the reference stands in it as a run of words after Whisper's English normaliser;
  exact match and token F1 beside it. `instruct`: sentence chrF to y_T, cosine to y_T under an encoder that is no reward
  (`similarity`) and under the reward's (`semantic`), the teacher's mean log-likelihood of the answer given the gold words, and the
  win rate against `sft` by it (ties one half). `s2tt`: corpus BLEU and chrF (sacrebleu; against the teacher's translation, so
  agreement, not quality). WER of Whisper's transcript: covariate.
- 95 % percentile bootstrap over items; differences to `sft` paired. A difference whose interval holds 0 is "not
  separable". † a metric the system was trained on: never the headline. NAME, NAME-s1, NAME-s2 are one system's training seeds:
  one row, the mean over them, with each seed's value in results.json and their range in the table.
- Gap recovered = (system - sft) / (text - sft), only where the interval of text - sft excludes 0.

Reads DIR/data/test_all.jsonl (before the WER bound) and DIR/*.pt. Writes DIR/answers/*.jsonl, results.json,
results.md, results.png.

    python 04_evaluate.py                      every system in DIR
    python 04_evaluate.py --ask question.wav   every system's answer to one recording
    python 04_evaluate.py --draw FILE.json     table and plot of a results.json again
"""
import contextlib
import json
import re
from collections import Counter
from pathlib import Path

import common                                             # first: it says in one line what is missing
from common import TASKS, UNTRAINED, UserError

import numpy as np
import sacrebleu
import torch
from tqdm import tqdm

FLAGS = {"systems": dict(help="comma-separated; default: all that DIR holds"),
         "conditions": dict(help="comma-separated acoustic conditions, clean first: clean,noise:5,reverb:0.6,band:1666,babble:5"),
         "data": dict(help="items to use instead of DIR/data/test_all.jsonl: JSONL with id, audio, task, instruction, reference, or "
                           "another split of 01's"),
         "draw": dict(metavar="FILE", help="a results.json: write its table and plot beside it"),
         "ask": dict(metavar="FILE", help="one recording (wav, flac, ogg, mp3; any rate): print every system's answer")}
CHECKPOINTS = ("sft", "sft+", "kd", "opd", "rba", "rba+opd")   # and, if asked for by name, `init`: no training at all
UNHEARD = ", unheard voices"
NAMES = {"wins": "% wins against sft by log π_T", "WER": "WER of Whisper"}
PRIMARY = {"sqa": "accuracy", "instruct": "chrF"}         # rewarded nowhere
TRAINED_BY = {("instruct", "semantic"): {"semantic"}, ("sqa", "F1"): {"task"}, ("s2tt", "chrF"): {"task"},
              ("instruct", "log π_T"): {"logp", "token"}, ("instruct", "wins"): {"logp", "token"}}


# ------------------------------------------------------------------------------------------------------ metrics
def is_contained(reference, answer):
    """The reference's words stand in the answer as one contiguous run: "Ca" does not match "because"."""
    wanted, said = (common.normalise(text).split() for text in (reference, answer))
    return bool(wanted) and any(said[i:i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def corpus_statistics(metric, answers, references):
    """sacrebleu's sufficient statistics, a row per item: their sums over items give the corpus score."""
    most = max(map(len, references))                      # sacrebleu wants as many of every item: the first again changes no score
    columns = [list(column) for column in zip(*([*own, *own[:1] * (most - len(own))] for own in references))]
    return np.array(metric._extract_corpus_statistics(answers, columns), float)


def corpus_score(metric):
    def aggregate(sums, n):
        flat = np.reshape(sums, (-1, np.shape(sums)[-1]))
        scores = [metric._compute_score_from_stats([int(v) for v in row]).score for row in flat]
        return np.reshape(scores, np.shape(sums)[:-1])
    return aggregate


def signature(metric):
    metric.corpus_score(["."], [["."]])                   # sacrebleu knows it after a first score
    return metric.get_signature()


def mean(sums, n):
    return sums[..., 0] / n


@torch.inference_mode()
def judge(model, teacher, items, answers):
    """Mean log pi_T of each `instruct` answer's tokens given the gold words (None elsewhere): a judge that is no default
    reward of `rba`."""
    scores, judged = [None] * len(items), [i for i, item in enumerate(items) if item["task"] == "instruct"]
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


def measure(items, answers, heard, scores, encoders):
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
                        "exact match": [100 * any(common.normalise(r) == common.normalise(a) for r in refs) for refs, a in pairs],
                        "F1": [100 * max(common.token_f1(a, r) for r in refs) for refs, a in pairs]}
        elif task == "instruct":
            per_item = {"chrF": [sacrebleu.sentence_chrf(a, refs).score for refs, a in zip(gold, said)]}
            for name, encode in encoders.items():
                both = encode([*said, *(refs[0] for refs in gold)])
                per_item[name] = (100 * (both[:len(said)] * both[len(said):]).sum(-1)).tolist()
            per_item["log π_T"] = [scores[i] for i in chosen]
        else:
            per_item = {}
            for name, metric in (("BLEU", sacrebleu.BLEU(effective_order=False)), ("chrF", sacrebleu.CHRF())):
                out[task, name] = corpus_statistics(metric, said, gold), corpus_score(metric)
        per_item["tokens"] = [answers[i][1] for i in chosen]
        for name, values in per_item.items():
            out[task, name] = np.array(values, float)[:, None], mean
        if heard:
            edits = [common.word_errors(items[i]["text"], heard[i]) for i in chosen]
            out[task, "WER"] = np.array(edits, float), lambda sums, n: 100 * sums[..., 0] / sums[..., 1]
    return out


def over_seeds(runs):
    """The metrics of one system's training seeds (list of what `measure` gives) -> the same of their mean: statistics side by side
    in columns, so that all seeds are resampled with the same items."""
    if len(runs) == 1:
        return runs[0]
    out = {}
    for key, (_, aggregate) in runs[0].items():
        def score(sums, n, aggregate=aggregate):
            return np.mean([aggregate(part, n) for part in np.split(sums, len(runs), -1)], 0)
        out[key] = np.concatenate([run[key][0] for run in runs], 1), score
    return out


def without_seed(system):
    """"rba-s1" -> "rba"."""
    return re.sub(r"-s\d+$", "", system)


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
    order, answers = sorted(range(len(items)), key=lambda i: lengths[i]), [None] * len(items)
    with torch.inference_mode(), tqdm(total=len(items), desc=f"answer {system}", unit="item", leave=False) as bar, (
            model.as_text_llm() if as_text else contextlib.nullcontext(model.llm)) as llm:
        for at in range(0, len(order), batch_size):
            chosen = order[at:at + batch_size]
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
    held = ["text", "cascade"] + [name for name in CHECKPOINTS if (args.work / f"{name}.pt").exists()]
    held += sorted(p.stem for p in args.work.glob("*.pt") if p.stem not in held and "." not in p.stem)
    chosen = args.systems.split(",") if args.systems else held
    missing = [name for name in chosen if name not in UNTRAINED and not (args.work / f"{name}.pt").exists()]
    if missing:
        raise UserError(f"--systems {missing[0]}: no {args.work / missing[0]}.pt; there are {', '.join(held)}")
    if args.ask and ({"data", "conditions"} & args.given.keys() or chosen == ["text"]):
        raise UserError("--ask answers one recording: without --data and --conditions, and not by text alone, which hears nothing")
    if args.systems or len(held) > 2:
        return chosen
    if not args.ask:
        raise UserError(f"{args.work}: no checkpoint yet; run 02_sft_warmup.py first (same --work)")
    return ["cascade", "init"]                            # right after the installation


def ask(args, systems):
    """Every system's answer to one recording."""
    wave = common.read_audio(args.ask)
    model = common.SpeechLM(vars(args))
    heard = model.listen([wave])
    print(f"{args.ask}: {len(wave) / common.RATE:.1f} s; Whisper hears: {heard[0]['text']}")
    for system in systems:
        if system != "text":                              # nobody typed the words
            load_system(model, system, args.work)
            [(answer, _, ended)] = answer_all(model, system, [dict(prompt="")], heard, args.max_new)
            print(f"{system:>8} | {answer}{'' if ended else ' …'}")


# ------------------------------------------------------------------------------------------------------- report
def compare(measured, base="sft", seed=0):
    """{condition: {system: [a seed's statistics, ...]}} -> rows: value, interval, paired difference to `base`, gap recovered."""
    rows = []
    for condition, systems in measured.items():
        one = {system: over_seeds(runs) for system, runs in systems.items()}
        for system, metrics in one.items():
            for (task, metric), (statistics, aggregate) in metrics.items():
                value, low, high = common.bootstrap(statistics, aggregate, seed=seed)
                row = dict(condition=condition, system=system, task=task, metric=metric, n=len(statistics), value=value,
                           low=low, high=high)
                if len(systems[system]) > 1:
                    seeds = [run[task, metric] for run in systems[system]]
                    row["seeds"] = [float(score(own.sum(0), len(own))) for own, score in seeds]
                other = one.get(base, {}).get((task, metric))
                if other is not None and system != base:
                    if metric == "log π_T":               # win rate by this judge, ties one half; mean over seeds
                        wins = 50 * (1 + np.sign(statistics - other[0].mean(1, keepdims=True)))      # (N, seeds)
                        won, low, high = common.bootstrap(wins.mean(1, keepdims=True), seed=seed)
                        rows.append(row | dict(metric="wins", value=won, low=low, high=high)
                                    | (dict(seeds=wins.mean(0).tolist()) if "seeds" in row else {}))
                    c, z = statistics.shape[1], statistics.shape[1] + other[0].shape[1]
                    columns = np.concatenate([statistics, other[0]], 1)
                    def difference(sums, n, own=aggregate, theirs=other[1], c=c):
                        return own(sums[..., :c], n) - theirs(sums[..., c:], n)
                    d = common.bootstrap(columns, difference, seed=seed)
                    row |= dict(difference=d[0], difference_low=d[1], difference_high=d[2],
                                separable=bool(d[1] > 0 or d[2] < 0))
                    text = one.get("text", {}).get((task, metric))
                    if PRIMARY.get(task) == metric and system != "text" and text is not None:
                        columns = np.concatenate([statistics, other[0], text[0]], 1)
                        def gap(s, n, theirs=other[1], top=text[1], c=c, z=z):
                            return top(s[..., z:], n) - theirs(s[..., c:z], n)
                        if common.bootstrap(columns, gap, seed=seed)[1] > 0:
                            def recovered(s, n, gap=gap, difference=difference, z=z):
                                return difference(s[..., :z], n) / gap(s, n)
                            g = common.bootstrap(columns, recovered, seed=seed)
                            row |= dict(gap_recovered=g[0], gap_recovered_low=g[1], gap_recovered_high=g[2])
                rows.append(row)
    return rows


def cell(row, dagger):
    if row is None:
        return "–"
    seeds = row.get("seeds", [0])
    spread = f" ({len(seeds)} seeds {min(seeds):.1f} to {max(seeds):.1f})" if max(seeds) > min(seeds) else ""
    return f"{row['value']:.1f}{'†' if dagger else ''} [{row['low']:.1f}, {row['high']:.1f}]{spread}"


def table(rows, trained, lines):
    """Markdown tables per condition and task, appended to `lines`; {system: what it was trained on} gives the daggers."""
    for condition in dict.fromkeys(row["condition"] for row in rows):
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
            cells = [f"{r['difference']:+.1f} [{r['difference_low']:+.1f}, {r['difference_high']:+.1f}] "
                     + ("separable" if r["separable"] else "not separable") if "difference" in r else "–" for r in own]
            gaps = [f"{r['task']} {r['gap_recovered']:+.2f} [{r['gap_recovered_low']:+.2f}, {r['gap_recovered_high']:+.2f}]"
                    for r in own if "gap_recovered" in r]
            lines.append(f"| {system} | " + " | ".join(cells) + f" | {', '.join(gaps) or '–'} |")


def plot(rows, path):
    """Primary metrics with their intervals, a panel per task, conditions side by side; legible in black and white."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    conditions = [c for c in dict.fromkeys(row["condition"] for row in rows) if not c.endswith(UNHEARD)]
    panels = [(t, m) for t, m in (*PRIMARY.items(), ("s2tt", "BLEU")) if any((r["task"], r["metric"]) == (t, m) for r in rows)]
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


def report(held, path):
    """results.json's content -> `path`.md and .png; prints the table."""
    counts = ", ".join(f"{n} {task}" for task, n in held["items"].items())
    lines = [f"# Results\n\nPreset `{held['preset']}`, seed {held['seed']}; {counts} held-out items before the WER bound, on "
             f"speech that this run synthesized; teacher `{held['teacher']}`. 95 % bootstrap intervals over items."]
    table(held["rows"], held["rewards"], lines)
    lines += ["\n† the system was trained on this metric (reward). `text` reads the gold words, `cascade` Whisper's transcript. "
              "References are the teacher's own: sqa and instruct measure agreement with it (`text`, which shares its "
              "weights, is near 100 but where bfloat16 rounding parts two greedy paths), s2tt too, whatever its translations are worth. BLEU: "
              f"`{signature(sacrebleu.BLEU())}`, chrF: `{signature(sacrebleu.CHRF())}`."]
    common.write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    plot(held["rows"], path.with_suffix(".png"))
    print("\n".join(lines))
    print(f"\n{path.with_suffix('')}.md, .json, .png")


def main():
    args = common.parse_args(__doc__, FLAGS)
    if args.draw:
        return draw(Path(args.draw))
    systems, conditions = available(args), args.conditions.split(",")
    for condition in conditions:
        common.parse_condition(condition)
    histories = {system: common.load_checkpoint(args.work / f"{system}.pt", "rba-speechlm-1").get("history", [])
                 for system in systems if system not in UNTRAINED}     # before the models are loaded: a file may be damaged
    if args.ask:
        ask(args, systems)
        return
    rank, world, device = common.setup_processes()
    if rank == 0:
        common.claim(args.work / "results.json")
    source = Path(args.data) if args.data else args.work / "data" / "test_all.jsonl"
    items = common.read_jsonl(source, own_item) if args.data else common.read_items(args.work, "test_all")
    if not items:
        raise UserError(f"{source}: holds no items")
    suffix = f"-{source.stem}" if args.data else ""
    model = common.SpeechLM(vars(args), device)
    encoders, teacher = dict(similarity=WordLlama(), semantic=common.Embedder(args.embedder, device)), common.Teacher(model, args.teacher)
    data_key = common.fingerprint(source)
    window = args.window if source.parent == args.work / "data" else 30.0
    measured, trained = {}, {without_seed(system): [r for past in history for r in (*past.get("rewards", {}), *(["token"] if past.get("token_reward") else []))]
                             for system, history in histories.items()}
    heard = {condition: common.listen_to_split(model, args.work, source, items, condition, window, rank, world)
             for condition in conditions}
    # ---- answers: one file per system and condition, kept as long as data and checkpoint are the same
    work = [(condition, system) for condition in conditions for system in systems
            if not (system == "text" and condition != conditions[0])]
    for at, (condition, system) in enumerate(tqdm(work, desc="systems", unit="system", disable=rank > 0)):
        checkpoint = args.work / f"{system}.pt"
        key = " ".join(map(str, (data_key, common.fingerprint(checkpoint if checkpoint.exists() else "none"), args.student,
                                 args.teacher, args.whisper, args.max_new, window, common.SYSTEM)))
        path = answers_path(args.work, source, system, condition)
        held = read_answers(path) if path.exists() else []
        if at % world == rank and [row.get("key") for row in held] != [key] * len(items):
            load_system(model, system, args.work)
            answers = answer_all(model, system, items, heard[condition], args.max_new)
            scores = judge(model, teacher, items, answers)
            common.write_jsonl(path, [dict(id=item["id"], key=key, system=system, condition=condition, answer=answer,
                                           tokens=tokens, ended=ended, score=scores[i])
                                      for i, (item, (answer, tokens, ended)) in enumerate(zip(items, answers))])
    common.barrier()
    if rank:
        return
    # ---- metrics, intervals, table, plot; once more for the items in voices that train does not have
    everything = range(len(items))
    unheard = common.parse_voices(args.unheard_voices)
    parts = {"": everything, UNHEARD: [i for i in everything if items[i].get("voice") in unheard]}
    for condition, system in work:
        rows = read_answers(answers_path(args.work, source, system, condition))
        for part, chosen in parts.items():
            if chosen and (not part or condition == conditions[0]):
                measured.setdefault(condition + part, {}).setdefault(without_seed(system), []).append(measure(
                    [items[i] for i in chosen], [(rows[i]["answer"], rows[i]["tokens"], rows[i]["ended"]) for i in chosen],
                    [heard[condition][i]["text"] for i in chosen] if system != "text" else None,
                    [rows[i]["score"] for i in chosen], encoders))
    for condition in conditions[1:]:                      # text hears nothing: the same in every condition
        if "text" in systems:
            measured[condition] = {"text": measured[conditions[0]]["text"]} | measured[condition]
    path = args.work / f"results{suffix}.json"
    held = dict(preset=args.preset, seed=args.seed, teacher=args.teacher, data=data_key, items=Counter(item["task"] for item in items),
                rows=compare(measured, seed=args.seed), rewards=trained, history=histories) | common.environment()
    common.write_json(path, held)
    report(held, path)


def draw(path):
    """Table and plot of a results.json once more."""
    try:
        held = json.loads(path.read_text())
        report(held, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--draw {path}: no results.json of this script ({type(error).__name__}: {str(error)[:80]}); run 04_evaluate.py "
                        "to make one") from None


def answers_path(work, source, system, condition):
    return work / "answers" / source.stem / f"{system}.{condition.replace(':', '-')}.jsonl"


def read_answers(path):
    fields = dict(id=str, key=str, answer=str, tokens=int, ended=bool)
    return common.read_jsonl(path, lambda row: {"score": None} | common.check_fields(row, fields), "04_evaluate.py")


def own_item(row):
    """A row of --data, with id, audio (relative to the file), task, instruction, reference (a string or list), as an item."""
    references = [row["reference"]] if isinstance(row.get("reference"), str) else row.get("reference")
    if not references:
        raise ValueError("has no reference")
    row = {"instruction": row.get("text")} | row         # 01's own files
    common.check_fields(row, dict(id=str, audio=str, task=str, instruction=str))
    item = dict(id=row["id"], audio=row["audio"], task=row["task"], text=row["instruction"], prompt=row.get("prompt", ""),
                reference=references)
    return common.check_item(item, {name: common.ITEM[name] for name in item})


if __name__ == "__main__":
    common.run(main)
