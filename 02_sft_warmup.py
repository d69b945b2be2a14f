"""Stage 2: warm-up of the SpeechLM, and the distillation baselines at RBA's budget.

[paper] the SpeechLM is trained on self-generated data before reinforcement learning, and compared with "conventional
distillation". The objectives [ours], each on the teacher's own answers y_T:
- sft:   -log pi_theta(y_T | s, p): sequence-level distillation; with RBA's budget, from sft.pt: the baseline `sft+`.
- kd:    sum_t KL(pi_T(. | x, p, y_T,<t) || pi_theta(. | s, p, y_T,<t)) on y_T's positions: token-level distillation.

Without --objective: prints the speech-text gap on train and valid -> sft.pt -> kd.pt, sft+.pt (both from sft.pt, with the
budget of the preset's RBA run: updates x sampled responses).

With --data, a set as 04 reads it takes the place of train (with --objective and --out): its references are y_T (human targets),
or, with --targets teacher, the teacher's own answers to the same words: the two on the same recordings.

Reads DIR/data. Writes DIR/NAME.pt (the last update), NAME.best.pt (the best on valid), NAME.config.json,
logs/NAME.jsonl, gap.json; heard/ keeps what Whisper made of the speech.

    python 02_sft_warmup.py                                       one process
    torchrun --nproc_per_node 8 02_sft_warmup.py --preset small   one node: the same gradients
"""
import json
import random
import time

import common                                             # first: it says in one line what is missing
from common import UserError

import numpy as np
import torch
from tqdm import tqdm

FLAGS = {"objective": dict(help="sft, kd or sft+ alone, from --init to --out"),
         "init": dict(help="checkpoint to start from, or none"),
         "out": dict(help="name of the checkpoint written with --objective"),
         "data": dict(help="FILE.jsonl or KIND:PATH, as in 04, to train on instead of DIR/data/train.jsonl"),
         "targets": dict(help="with --data: reference or teacher"),
         "max-steps": dict(type=int, help="updates, for every objective run"),
         "batch-size": dict(type=int, help="utterances or sequences an update"),
         "micro-tokens": dict(type=int, help="tokens a forward pass; lower it when memory runs out"),
         "lr": dict(type=float, help="peak learning rate")}
SAVE_EVERY = 25                                           # updates between resume files
VALIDATED = 96                                            # items of valid whose NLL is watched; learning rates are chosen by 04 on all


# -------------------------------------------------------------------------------------------------- objectives
def sft_loss(model, items, heard):
    """-sum log pi_theta(y_T | s, p) over the answers' tokens, end token included."""
    answers = [model.answer_ids(item["response"]) for item in items]
    prompts = model.speech_prompts(heard, [item["prompt"] for item in items])
    return -common.token_log_probs(model.llm, *common.answer_states(model.llm, prompts, answers)).sum()


def kl_rows(teacher_logits, student_logits):
    """KL(teacher || student) per row over the vocabulary both have. (rows, V_T), (rows, V_S) -> (rows,)."""
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])                         # padded sizes may differ
    log_t = teacher_logits[:, :size].float().log_softmax(-1)                               # (rows, V)
    log_s = student_logits[:, :size].float().log_softmax(-1)                               # (rows, V)
    return (log_t.exp() * (log_t - log_s)).sum(-1)                                         # (rows,)


def kd_loss(model, teacher, items, heard):
    """Sum over y_T's positions of KL(pi_T || pi_theta); only these positions of the two prompts line up."""
    answers = [model.answer_ids(item["response"]) for item in items]
    teacher_llm, teacher_states, _ = teacher.answer_states(items, answers)                 # (sum L, d_T)
    prompts = model.speech_prompts(heard, [item["prompt"] for item in items])
    states, _ = common.answer_states(model.llm, prompts, answers)                          # (sum L, d_S)
    teacher_head, head = (llm.get_output_embeddings() for llm in (teacher_llm, model.llm))
    return common.by_chunks(lambda s, t: kl_rows(teacher_head(t), head(s)), states, teacher_states).sum()


def with_targets(model, items, targets, args):
    """Items of a set, with y_T as `response`: their first reference, or the teacher's greedy answer to the words; "" where there is
    none, or it did not end by itself."""
    if targets == "reference":
        return [item | {"response": (item["reference"] or [""])[0]} for item in items]
    answers, tokenizer, llm = [], model.tokenizer, model.llm
    if args.teacher != args.student:
        tokenizer, llm = common.load_llm(args.teacher)
        llm.to(model.device)
    end_id = common.chat_parts(tokenizer)[2]
    with torch.no_grad(), common.autocast(llm), model.as_text_llm():
        for at in range(0, len(items), 32):
            chunk = items[at:at + 32]
            prompts = common.text_prompts(tokenizer, llm, [i["text"] for i in chunk], [i["prompt"] for i in chunk])
            answers += [reply for [reply] in common.sample(llm, prompts, end_id, args.max_new)]
    return [item | {"response": tokenizer.decode(ids, skip_special_tokens=True).strip() if ended else ""}
            for item, (ids, ended) in zip(items, answers)]


# -------------------------------------------------------------------------------------------------- validation
@torch.no_grad()
def answer_nll(model, items, heard=None, batch_size=16):
    """NLL of y_T per item, (N, 2): sum over its tokens, number of tokens; given the speech, or the text if `heard` is
    None."""
    rows = []
    with common.autocast(model.llm):
        for at in range(0, len(items), batch_size):
            chunk = items[at:at + batch_size]
            answers = [model.answer_ids(item["response"]) for item in chunk]
            if heard is None:
                log_probs = common.token_log_probs(*common.Teacher(model, model.config["student"]).answer_states(chunk, answers))
            else:
                prompts = model.speech_prompts(heard[at:at + batch_size], [item["prompt"] for item in chunk])
                log_probs = common.token_log_probs(model.llm, *common.answer_states(model.llm, prompts, answers))
            rows += [[-float(part.sum()), len(part)] for part in log_probs.split([len(y) for y in answers])]
    return np.array(rows)


def speech_text_gap(model, work, splits, limit=64):
    """NLL(y_T | s) - NLL(y_T | x) per token on both splits; they must agree before SFT, or the model has seen train."""
    report = {"of": {split: common.fingerprint(work / "data" / f"{split}.jsonl") for split in splits}}
    for split, (items, heard) in splits.items():
        chosen = random.Random(0).sample(range(len(items)), min(limit, len(items)))        # of all tasks
        rows = [items[i] for i in chosen]
        speech, text = answer_nll(model, rows, [heard[i] for i in chosen]), answer_nll(model, rows)
        columns = np.stack([speech[:, 0], text[:, 0], text[:, 1]], 1)                      # sums over tokens, tokens
        gap = common.bootstrap(columns, lambda s, n: (s[..., 0] - s[..., 1]) / s[..., 2])
        report[split] = {"items": len(columns), "nll_speech": speech[:, 0].sum() / speech[:, 1].sum(),
                         "nll_text": text[:, 0].sum() / text[:, 1].sum(), "gap": gap[0], "interval": gap[1:]}
    a, b = report["train"]["interval"], report["valid"]["interval"]
    report["agree"] = bool(a[0] <= b[1] and b[0] <= a[1])
    common.write_json(work / "gap.json", report)
    return report


def print_gap(report, work, splits):
    """ValueError if it is of other data."""
    if report["of"] != {split: common.fingerprint(work / "data" / f"{split}.jsonl") for split in splits}:
        raise ValueError
    for split in ("train", "valid"):
        r = report[split]
        print(f"speech-text gap before SFT, {split} ({r['items']} items): NLL {r['nll_speech']:.3f} given speech, "
              f"{r['nll_text']:.3f} given text, gap {r['gap']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]")
    if not report["agree"]:
        print("warning: the two intervals do not overlap: the model has seen train, or the splits differ")


# -------------------------------------------------------------------------------------------------- training
def train(model, name, objective, init, steps, batch_size, lr, data, args, rank, world, teacher=None):
    """One objective from `init` (a checkpoint's path or none) to DIR/NAME.pt; resumes from NAME.resume.pt."""
    work, log, resume = args.work, args.work / "logs" / f"{name}.jsonl", args.work / f"{name}.resume.pt"
    items, heard = data["train"]
    facts = dict(objective=objective, init=common.fingerprint(init), steps=steps, batch_size=batch_size, lr=lr, seed=args.seed,
                 data=common.digest([[i["id"], i["text"], i["prompt"], i["response"]] for i in items]) if args.data else
                 common.fingerprint(args.source)) | ({"targets": args.targets, "set": args.data} if args.data else {})
    config, done = work / f"{name}.config.json", common.is_done(work / f"{name}.pt", work / f"{name}.config.json")
    parent = {} if done else model.load(init)
    if rank == 0:
        common.record_config(config, model.config | facts)
    common.barrier()
    if done:
        if rank == 0:
            resume.unlink(missing_ok=True)
            print(f"{name}: done already ({work / name}.pt)")
        return
    optimizer = common.make_optimizer(model)
    first, best, skipped = common.load_resume(resume, model, optimizer, log)
    lengths = [len(model.answer_ids(item["response"])) for item in items]
    sizes = [common.PROMPT_TOKENS + len(row["ids"]) + length for row, length in zip(heard, lengths)]
    facts |= dict(history=[*parent.get("history", []), dict(facts)])

    order = random.Random(0).sample(range(len(data["valid"][0])), len(data["valid"][0]))
    shuffled = [[rows[i] for i in order] for rows in data["valid"]]

    def validated(row, step):
        """Add the validation to a log row; keep the checkpoint if it is the best so far; write what a kill needs."""
        nonlocal best
        sums = answer_nll(model, *(rows[:VALIDATED] for rows in shuffled)).sum(0)
        row["valid_nll"] = score = float(sums[0] / sums[1])
        if rank == 0:
            if best is None or score < best:              # never by a NaN
                model.save(work / f"{name}.best.pt", **facts, metrics={"valid_nll": score, "step": step})
            tqdm.write(f"{name} {step}/{steps}: " + (f"loss {row['loss']:.3f}, " if step else "") + f"valid NLL {score:.3f}")
        best = score if best is None else min(best, score)
        return row

    if first == 0 and best is None:
        validated({}, 0)                                  # the start takes part: training may not make it worse
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="update", disable=rank > 0)
    for step in bar:
        started = time.time()
        batch = common.batch_at(len(items), batch_size, step, args.seed, "items", len(parent.get("history", [])))
        tokens = sum(lengths[i] for i in batch)           # global, so that micro-batches and processes add up
        mine, total = sorted(batch[rank::world], key=sizes.__getitem__), 0.0
        for chunk in common.token_batches([sizes[i] for i in mine], args.micro_tokens):
            rows, sounds = zip(*((items[mine[at]], heard[mine[at]]) for at in chunk))
            with common.autocast(model.llm):
                loss = kd_loss(model, teacher, rows, sounds) if objective == "kd" else sft_loss(model, rows, sounds)
                loss = loss / tokens
            loss.backward()
            total += float(loss.detach())
        rate, total = common.learning_rate(step, steps, lr), sum(common.gather([total]))
        norm = common.optimizer_step(optimizer, rate, total)
        skipped.append(norm is None)
        row = dict(step=step, loss=total, lr=rate, grad_norm=norm, seconds=round(time.time() - started, 3))
        if (step + 1) % max(1, steps // 4) == 0 or step + 1 == steps:
            row = validated(row, step + 1)
        if rank == 0:
            common.append_jsonl(log, row)
        common.stop_if_all_skipped(skipped, name, model, work / f"{name}.stopped.pt", **facts)   # before this step can count as done
        if rank == 0:
            if (step + 1) % SAVE_EVERY == 0 or "valid_nll" in row:
                common.save_resume(resume, model, optimizer, step + 1, best)
        bar.set_postfix({"loss": f"{total:.3f}"} | ({"skipped": sum(skipped)} if any(skipped) else {}))
    if rank == 0:
        # the last update, as for RL, which has no validation to choose by
        model.save(work / f"{name}.pt", **facts, metrics={"best_valid": best})
        resume.unlink(missing_ok=True)
    common.barrier()


def main():
    args = common.parse_args(__doc__, FLAGS)
    if args.objective not in (None, "sft", "kd", "sft+"):
        raise UserError(f"--objective {args.objective}: not one of sft, kd, sft+")
    if args.targets not in ((None, "reference", "teacher") if args.data else (None,)):
        raise UserError(f"--targets {args.targets}: reference or teacher, and with --data alone")
    if args.data and not (args.objective and args.out):
        raise UserError("--data needs --objective and --out: what is trained on it has a name of its own")
    args.targets = args.targets or "reference"
    if (args.out or args.init) and not args.objective:
        raise UserError("--init and --out are for one --objective; without --objective the names are fixed")
    rank, world, device = common.setup_processes()

    # ---- what to run: (name, objective, init, numbers)
    flags = {"max_steps": "steps", "batch_size": "batch_size", "lr": "lr"}
    flags = {own: args.given[flag] for flag, own in flags.items() if flag in args.given}
    budget = dict(steps=args.rl_steps, batch_size=args.rl_prompts * args.k, lr=args.rl_lr) | flags   # RBA's updates x responses
    warm_up, start = dict(steps=args.sft_steps, batch_size=args.batch_size, lr=args.lr) | flags, args.work / "sft.pt"
    distill = budget | dict(lr=args.given.get("lr", args.distill_lr))
    runs = [("sft", "sft", "none", warm_up), ("kd", "kd", start, distill), ("sft+", "sft", start, budget)]
    if args.objective:
        [(name, objective, init, numbers)] = [run for run in runs if run[0] == args.objective]
        init = args.given.get("init", init)
        runs = [(args.out or name, objective, init, numbers)]
        if str(init) != "none":
            common.load_checkpoint(init, "rba-speechlm-1")    # before the models are loaded: it may be missing
    splits = {split: common.read_items(args.work, split) for split in ("train", "valid")}
    args.source, folder = args.work / "data" / "train.jsonl", None
    if args.data:
        args.source, folder, items, broken = common.read_set(args.data, args.language)
        splits["train"] = [item for item in items if item["id"] not in broken]
        if rank == 0:
            print(f"{args.data}: {len(broken)} of {len(items)} items can't be heard and are left out", *broken.values(), sep="\n  ")
    for name, _, _, numbers in runs:
        if numbers["batch_size"] > len(splits["train"]):
            raise UserError(f"{name}: a batch of {numbers['batch_size']} is larger than the {len(splits['train'])} items of train.jsonl; "
                            "use a smaller --batch-size")

    if rank == 0:
        common.print_estimate(args, others={args.teacher} - {args.student} if any(run[1] == "kd" for run in runs) else ())
    model = common.load_speechlm(vars(args), device)
    data = {}
    for split, path, own in (("train", args.source, folder), ("valid", args.work / "data" / "valid.jsonl", None)):
        data[split] = splits[split], common.listen_to_split(model, args.work, path, splits[split], "clean", 30.0 if own else args.window,
                                                            rank, world, own)
    if args.data:
        pairs = zip(with_targets(model, splits["train"], args.targets, args), data["train"][1])
        data["train"] = [*zip(*(pair for pair in pairs if common.has_words(pair[0]["response"])))] or [(), ()]
        if len(data["train"][0]) < runs[0][3]["batch_size"]:
            raise UserError(f"--data {args.data}: {len(data['train'][0])} items have an answer to learn, fewer than a batch of "
                            f"{runs[0][3]['batch_size']}; use a smaller --batch-size")
    teacher = None
    if any(objective == "kd" for _, objective, _, _ in runs):
        try:
            teacher = common.Teacher(model, args.teacher)
        except UserError as error:                        # not needed by the other runs
            if args.objective:
                raise
            print(f"kd is left out: {error}")
    if not all(common.gather([teacher is not None])):     # of all processes alike
        runs = [run for run in runs if run[1] != "kd"]
    if not args.objective:
        if rank == 0:
            try:
                print_gap(json.loads((args.work / "gap.json").read_text()), args.work, data)
            except (OSError, ValueError, KeyError, TypeError):   # not yet, of other data, or damaged
                print_gap(speech_text_gap(model, args.work, data), args.work, data)
        common.barrier()
    for name, objective, init, numbers in runs:
        train(model, name, objective, init, data=data, args=args, rank=rank, world=world, teacher=teacher, **numbers)
    if rank == 0:
        common.print_peak()


if __name__ == "__main__":
    common.run(main)
