"""Stage 3: reinforced behaviour alignment. The SpeechLM learns by preference from its own samples.

1. Sample and judge -> samples/NAME.jsonl, a line an utterance: pi_ref answers x^(s) in every voice; pairs.
2. Optimise from pi_ref's weights, V = pi_theta / pi_ref of an answer given its own voice's speech:
   rba-group   L_G = -log sigma(beta log V+ - beta log V-), + and - the answers of one instruction's voices
               that the reward model likes best and least [Eq. 2];
   rba-single  L_S alike, + the teacher's y_ref, - the model's own answer, in every voice; rewards are for
               the log alone [Eq. 6];
   either with lambda L_CE beside it [Eq. 5; for rba-single ours], L_CE as in Eq. 1.

Where this departs from the paper, or chooses in its silence [ours]:
- samples are drawn once a round, those of the first for both objectives; --rounds R repeats 1 and 2 with
  the model that came out, the next round's pi_ref (as SPIN). With a round an update (--rounds = --max-steps)
  pi_theta is pi_ref at every update, and rba-single's negative teaches nothing:
  E_{y ~ pi_theta} grad log pi_theta(y) = 0 (at T = 1);
- starts from sft.pt, the first pi_ref; --reference none is the paper's variant without (V = pi_theta);
- log V sums over tokens, end token included, at temperature 1 whatever T the samples were drawn at;
- no pair where two answers are equal or rewards tie; an answer that was cut is never a positive;
- one training set: an instruction in one voice (sqa, the paper's RBA-QA) takes part in rba-group by Eq. 6,
  a pair each as a group of four has; the paper trains it by rba-single alone, afterwards;
- L_CE is averaged over utterances (four voices weigh four times one), L_G, L_S over pairs; the gradient is
  clipped.

Reads DIR/data, DIR/sft.pt. Writes samples/NAME.jsonl, NAME.pt, NAME.config.json, logs/NAME.jsonl,
plots/NAME.png. Without --objective: rba-group, then rba-single.

    python 03_rba_rl.py                                       one process
    torchrun --nproc_per_node 8 03_rba_rl.py --work small     one node: the same gradients
"""
import common                                             # first: it says in one line what is missing
from common import UserError

import bisect
import functools
import itertools
import random
from collections import Counter
from statistics import fmean

import torch
import torch.nn.functional as F

FLAGS = {"objective": dict(choices=("rba-group", "rba-single"), help="this one alone"),
         "beta": dict(type=float, help="β of Eq. 2 and 6"),
         "lambda-ce": dict(type=float, help="λ of Eq. 5"),
         "ce-reduction": dict(choices=("sum", "mean"), help="of L_CE over an answer's tokens; Eq. 1: sum"),
         "temperature": dict(type=float, help="T at which the samples are drawn"),
         "reference": dict(choices=("init", "none"), default="init", help="pi_ref: a round's first weights; "
                           "none: V = pi_theta"),
         "rounds": dict(type=common.count, help="how often samples are drawn"),
         "control": dict(choices=("shuffled", "positive", "text"), default="none", help="a run to compare "
                         "with; shuffled: chance picks the positive; positive: no negative; text: the true "
                         "words for what was heard")
         } | common.TRAIN_FLAGS
SAMPLED = 32                                              # groups sampled, judged and written at once
TIE = 0.02                                                # nats: a smaller margin of log V is rounding's
COPIED = ("id", "group", "task", "voice", "text", "response")   # of an item into its sample


# --------------------------------------------------------------------------------- 1: samples, rewards, pairs
def decide_pairs(rows, objective, control, seed):
    """Write `role` into the rows of one group: positive, negative or, with `why`, neither. With the control
    `shuffled` chance decides: the group's rewards change places, or a coin tells y_ref from y^(s)."""
    for row in rows:
        row |= dict(role="", why="")
    chance = random.Random(common.derive_seed(seed, rows[0]["round"], rows[0]["group"]))
    rewards, shuffled = [row["reward"] for row in rows], control == "shuffled"
    if objective == "rba-single" or len(rows) == 1:
        single_roles(rows, chance if shuffled else None)
    else:
        group_roles(rows, chance.sample(rewards, len(rewards)) if shuffled else rewards)


def single_roles(rows, coin):
    """Eq. 6: y^(s) is the negative, y_ref the positive, in every row; or as the coin, if any, falls."""
    for row in rows:
        if row["answer"] == row["response"]:
            row["why"] = "equals y_ref"
        elif coin and not row["ended"]:                   # it could be the negative alone
            row["why"] = "did not end"
        else:
            row["role"] = "positive" if coin and coin.random() < 0.5 else "negative"


def group_roles(rows, rewards):
    """Eq. 2: s+ = argmax R, s- = argmin R."""
    complete = [s for s in range(len(rows)) if rows[s]["ended"]]
    best = max(complete, key=rewards.__getitem__, default=0)                               # s+
    worst = min(range(len(rows)), key=rewards.__getitem__)                                 # s-
    reason = ""
    if not complete:
        reason = "no answer ended"
    elif complete == [worst]:
        reason = "only the worst ended"
    elif rewards[best] - rewards[worst] < 1e-6:
        reason = "rewards tie"
    elif rows[best]["answer"] == rows[worst]["answer"]:
        reason = "answers are equal"
    for s, row in enumerate(rows):
        if not reason and s in (best, worst):
            row["role"] = "positive" if s == best else "negative"
        else:
            row["why"] = reason or "between"


def draw_samples(model, reward, items, heard, round_, args):
    """One answer y^(s) ~ pi_ref to each of N utterances, its reward, log pi_ref of y_ref and of y^(s): N
    rows."""
    seeds = [common.derive_seed(args.seed, "sample", round_, item["id"]) for item in items]
    requests = [item["prompt"] for item in items]
    answers = model.answer(heard, requests, args.max_new, seeds, args.temperature)
    rewards = reward(items, [answer.text for answer in answers])
    log_probs, rows = common.answer_log_probs(model, items, heard, answers), []
    for i, (item, answer) in enumerate(zip(items, answers)):
        row = {"round": round_} | {key: item[key] for key in COPIED}
        row |= dict(heard=heard[i]["text"], answer=answer.text, ids=answer.ids, ended=answer.ended)
        rows.append(row | dict(reward=rewards[i], logp_y_ref=log_probs[i][0], logp_answer=log_probs[i][1]))
    return rows


def sample_and_judge(model, reward, items, heard, groups, round_, run, args, drawn):
    """A round's samples of `groups` (lists of indices): {utterance id: row}, and a line each in the file.
    Batches of SAMPLED groups, one by each process at a time, in order: the first of them are what a kill has
    left, half a batch is made again. drawn: this round's rows by id, if the other objective has them of the
    same pi_ref."""
    def paired(part):
        utterances = list(itertools.chain(*part))
        some = [items[i] for i in utterances]
        if drawn:
            rows = [dict(drawn[item["id"]]) for item in some]
        else:
            rows = draw_samples(model, reward, some, [heard[i] for i in utterances], round_, args)
        for group in common.groups_of(rows):
            decide_pairs([rows[i] for i in group], args.objective, args.control, args.seed)
        return rows
    path = args.work / "samples" / f"{run.name}.jsonl"
    rows = common.read_jsonl(path, torn=True) if path.exists() else []
    batches = [groups[at:at + SAMPLED] for at in range(0, len(groups), SAMPLED)]
    sizes = [sum(map(len, batch)) for batch in batches]
    ends = list(itertools.accumulate(sizes, initial=sum(row["round"] < round_ for row in rows)))
    done = bisect.bisect(ends, len(rows)) - 1             # whole batches of this round
    del rows[ends[done]:]
    common.barrier()                                      # all have read it
    if common.rank() == 0:
        common.write_jsonl(path, rows)
    rows += common.shared(batches[done:], paired, functools.partial(common.append_jsonl, path),
                          desc=f"sample {run.name}")
    return {row["id"]: row for row in rows if row["round"] == round_}


def describe_samples(samples, objective):
    """What a round's samples could teach: reward by voice, its variance within groups and, without what that
    adds, between them, best of a group against its mean (the headroom), how often s+ was heard better than
    s- (the reward may only be choosing who was heard well), pairs left."""
    several, better, out = [], Counter(), {}
    for group in common.groups_of(samples):
        rows = [samples[i] for i in group]
        if len(rows) > 1:
            several.append([row["reward"] for row in rows])
        paired = [row for row in rows if row["role"]]
        errors = {row["role"]: common.word_errors(row["text"], row["heard"])[0] for row in paired}
        if len(errors) == 2 and objective == "rba-group":
            gap = errors["negative"] - errors["positive"]
            better["better" if gap > 0 else "worse" if gap < 0 else "alike"] += 1
    for voice in sorted({row["voice"] for row in samples}):
        out[f"samples/reward/{voice}"] = fmean(row["reward"] for row in samples if row["voice"] == voice)
    if len(several) > 1:
        spread = [torch.tensor(rewards).var() for rewards in several]
        out["samples/variance_within"] = float(torch.stack(spread).mean())
        of_means = float(torch.tensor([fmean(rewards) for rewards in several]).var())
        out["samples/variance_between"] = of_means - out["samples/variance_within"] / len(several[0])
        out["samples/headroom"] = fmean(max(rewards) - fmean(rewards) for rewards in several)
    for how, number in better.items():
        out[f"samples/positive_heard_{how}"] = number / better.total()
    out |= {"samples/reward": fmean(row["reward"] for row in samples),
            "samples/ended": fmean(row["ended"] for row in samples),
            "samples/tokens": fmean(len(row["ids"]) for row in samples),
            "samples/in_a_pair": fmean(bool(row["role"]) for row in samples)}
    return out


# -------------------------------------------------------------------------------------------------- 2: losses
def pair_up(rows, objective):
    """The pairs of one group by its rows' roles: (positive, negative), each the id of its utterance and
    whether it is the "y_ref" or the "answer" y^(s)."""
    if objective == "rba-group" and len(rows) > 1:        # Eq. 2
        role = {row["role"]: (row["id"], "answer") for row in rows}
        return [(role["positive"], role["negative"])] if "positive" in role else []
    pairs = []
    for row in rows:                                      # Eq. 6
        pair = (row["id"], "y_ref"), (row["id"], "answer")
        if row["role"]:                                   # positive: by the coin of --control shuffled
            pairs.append(pair if row["role"] == "negative" else pair[::-1])
    return pairs


def needed(rows, args):
    """The answers that the losses of one group read: a set of (id, "y_ref" or "answer")."""
    read = set(itertools.chain(*pair_up(rows, args.objective)))
    return read | {(row["id"], "y_ref") for row in rows if args.lambda_ce}


def needed_log_probs(model, items, heard, groups, args):
    """log pi_theta, token by token, of what the losses of `groups` (lists of rows, in the order of items)
    read: {(id, "y_ref" or "answer"): (L,)}. The two of an utterance share one computation of their prompt."""
    read, prompts, answers, keys = set().union(*(needed(rows, args) for rows in groups)), [], [], []
    for item, sound, row in zip(items, heard, itertools.chain(*groups)):
        ids = {(row["id"], "y_ref"): model.answer_ids(item["response"]),
               (row["id"], "answer"): row["ids"] + [model.end_id] * row["ended"]}
        ids = {key: y for key, y in ids.items() if key in read}
        if ids:
            prompts += model.speech_prompts([sound], [item["prompt"]])
            answers.append([*ids.values()])
            keys += ids
    return dict(zip(keys, common.token_log_probs(model.llm, prompts, answers)))


def preference_loss(plus, minus, plus_ref, minus_ref, beta):
    """-log sigma(beta log V+ - beta log V-) of log-probabilities (n,) under pi_theta and pi_ref, summed over
    tokens; -> (n,), and the implicit rewards beta log V+ and beta log V- (n,)."""
    beta_log_v_plus = beta * (plus - plus_ref)                                             # (n,) Eq. 3, 7
    beta_log_v_minus = beta * (minus - minus_ref)                                          # (n,) Eq. 4, 8
    loss = -F.logsigmoid(beta_log_v_plus - beta_log_v_minus)                               # (n,) Eq. 2, 6
    return loss, beta_log_v_plus, beta_log_v_minus


def losses(log_probs, groups, args):
    """L_CE of N utterances (N,), none of them where lambda is 0, and of their pairs {name: (n,)}: the
    preference loss and TRL's metrics.

    log_probs: {(id, "y_ref" or "answer"): (L,)}, as `needed_log_probs` gives; groups: the N rows in groups.
    """
    rows = {row["id"]: row for row in itertools.chain(*groups)}
    place = {key: at for at, key in enumerate(log_probs)}
    logp = torch.stack([lp.sum() for lp in log_probs.values()])                            # (M,)
    reference = logp.new_tensor([rows[id_]["logp_" + which] for id_, which in log_probs])  # (M,)
    if args.reference == "none":
        reference = torch.zeros_like(reference)           # V = pi_theta
    y_refs = [log_probs[row["id"], "y_ref"] for row in itertools.chain(*groups) if args.lambda_ce]
    ce = [-lp.mean() if args.ce_reduction == "mean" else -lp.sum() for lp in y_refs]
    ce = torch.stack(ce) if ce else logp.new_zeros(0)                                      # (N,) Eq. 1
    pairs = []
    for group in groups:
        pairs += [(place[plus], place[minus]) for plus, minus in pair_up(group, args.objective)]
    plus, minus = torch.tensor(pairs, dtype=torch.long, device=logp.device).view(-1, 2).T  # (n,) each
    negative, negative_ref = logp[minus], reference[minus]
    if args.control == "positive":                        # the negative teaches nothing: V- = 1
        negative = negative_ref = negative.detach()
    loss, chosen, rejected = preference_loss(logp[plus], negative, reference[plus], negative_ref, args.beta)
    margins = chosen - rejected                                                            # (n,)
    decided = torch.where(margins.abs() < args.beta * TIE, 0, margins.sign())              # (n,)
    return ce, {"loss/preference": loss, "rewards/chosen": chosen, "rewards/rejected": rejected,
                "rewards/accuracies": (1 + decided) / 2, "rewards/margins": margins,
                "logps/chosen": logp[plus], "logps/rejected": negative}


def backward(model, batch, items, heard, samples, args):
    """One update's gradients of L_G + lambda L_CE, or L_S + lambda L_CE, on a batch of groups that the
    processes share; -> metrics. Averages are over the whole batch: micro-batches and processes add up."""
    groups = [[samples[items[i]["id"]] for i in group] for group in batch]
    n_pairs = sum(len(pair_up(rows, args.objective)) for rows in groups)
    n_utterances, sums, mine, lengths = sum(map(len, batch)), Counter(loss=0.0), [], []
    for g in range(common.rank(), len(batch), common.world()):
        read = {id_ for id_, _ in needed(groups[g], args)}
        if read:
            words = sum(len(heard[i]["ids"]) for i in batch[g] if items[i]["id"] in read)
            mine.append(g)
            lengths.append(words + len(read) * (common.PROMPT_TOKENS + 2 * args.max_new))  # at most
    for chunk in common.token_batches(lengths, args.micro_tokens):
        some = [groups[mine[at]] for at in chunk]
        utterances = list(itertools.chain(*(batch[mine[at]] for at in chunk)))
        sounds = [heard[i] for i in utterances]
        log_probs = needed_log_probs(model, [items[i] for i in utterances], sounds, some, args)
        ce, of_pairs = losses(log_probs, some, args)
        preference = of_pairs["loss/preference"].sum() / max(1, n_pairs)                   # L_G or L_S
        loss = preference + args.lambda_ce * ce.sum() / n_utterances                       # Eq. 5
        loss.backward()
        sums["loss"] += float(loss.detach())
        if args.lambda_ce:
            sums["loss/ce"] += float(ce.detach().sum()) / n_utterances
        for name, values in of_pairs.items() if n_pairs else ():
            sums[name] += float(values.detach().sum()) / n_pairs
    metrics = Counter()
    for part in common.gather([sums]):
        metrics.update(part)
    return dict(metrics) | {"pairs": n_pairs, "utterances": n_utterances}


# --------------------------------------------------------------------------------------------------- training
def align(model, items, heard, reward, run, args, drawn):
    """The stage: in each round sample -> reward -> pairs, then in each of its updates loss -> step -> log.
    drawn: the first round's rows by id, empty until an objective has drawn them; filled here."""
    groups, samples = common.groups_of(items), None
    if common.rank() == 0 and not run.resume.exists():    # earlier samples are another run's
        (args.work / "samples" / f"{run.name}.jsonl").unlink(missing_ok=True)
    common.barrier()
    batches = common.batches(len(groups), args.batch_size, args.max_steps, args.seed, "groups")
    rounds = [step * args.rounds // args.max_steps for step in range(args.max_steps)]
    for step in run.updates():
        first = rounds.index(rounds[step]) == step        # of its round
        if first:
            run.save()                                    # whose weights this round's samples are drawn from
        if first or samples is None:
            visited = {g for at, batch in enumerate(batches) if rounds[at] == rounds[step] for g in batch}
            some = [groups[g] for g in sorted(visited)]
            known = {} if rounds[step] else drawn
            samples = sample_and_judge(model, reward, items, heard, some, rounds[step], run, args, known)
            if step == 0:
                drawn |= samples
        if not any(row.get("sampled") == rounds[step] for row in run.rows):
            run.write({"sampled": rounds[step]} | describe_samples(list(samples.values()), args.objective))
        batch = [groups[g] for g in batches[step]]
        metrics = backward(model, batch, items, heard, samples, args)
        run.update(metrics | {"round": rounds[step]})
    run.finish([["rewards/margins", "rewards/accuracies"], ["logps/chosen", "logps/rejected"],
                ["held_out/logps_y_ref"], ["held_out/kl"], ["held_out/tokens"]])


def main():
    args = common.parse_args(__doc__, FLAGS)
    if args.out and not args.objective:
        raise UserError("--out is for one --objective; without it the names are fixed")
    device = common.setup_processes()
    args.max_steps, args.batch_size = args.max_steps or args.rl_steps, args.batch_size or args.rl_batch
    init = args.init or args.work / "sft.pt"
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0")
    if args.rounds > args.max_steps:
        raise UserError(f"--rounds {args.rounds}: more than the {args.max_steps} updates")
    common.fingerprint(init)                              # before the models are loaded: it may be missing
    items, reward = common.read_items(args.work, "train"), common.Reward(args, device)
    model = common.load_speechlm(vars(args), device)
    heard = common.listen_to_split(model, args.work, "train", items, window=args.window)
    if args.control == "text":
        heard = [model.read(item["text"]) for item in items]   # the true words
    held_out, drawn = common.HeldOut(model, args, reward), {}
    for objective in [args.objective] if args.objective else ["rba-group", "rba-single"]:
        args.objective = objective
        keys = ("objective", "beta", "lambda_ce", "ce_reduction", "temperature", "reward",
                "reference", "rounds", "control", "batch_size", "max_new")
        name = args.out or objective + f"-{args.control}" * (args.control != "none")
        run = common.Run(model, args, name, init, args.max_steps, held_out,
                         **{key: getattr(args, key) for key in keys})
        if not run.done:
            align(model, items, heard, reward, run, args, drawn)


if __name__ == "__main__":
    common.run(main)
