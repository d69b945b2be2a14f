"""Stage 3: reinforced behaviour alignment, the SpeechLM against its teacher (RBA, step 2).

[paper] the SpeechLM is aligned to the teacher's behaviour by reinforcement learning; [summary] a pre-trained reward
model judges its answers. Everything else is [ours]:
1. K answers y_k ~ pi_theta(. | s, p) at temperature T without truncation; the audio is encoded and prefilled once per
   prompt. log pi_theta, log pi_ref and log pi_T are of the same T throughout: the policy that acts is the one that learns.
2. Sequence rewards R_j: `rm`, a pre-trained reward model on the gold text [summary]; `semantic`, cosine of the
   embeddings of y and y_T; `logp`, mean log pi_T(y_t | x, p, y_<t); `task`, token F1 with the short answer (sqa),
   sentence chrF with the translation (s2tt).
3. Token reward r_k,t = log pi_T(y_k,t | x, p, y_k,<t) - log pi_theta(y_k,t | s, p, y_k,<t): on-policy distillation.
4. A_k,t = sum_j w_j (R_j,k - b_j,k) / sigma_j + w_tok r_k,t - beta sum_{t' >= t} (log pi_theta - log pi_ref)(y_k,t'),
   detached; b the mean of the prompt's other samples (`loo`) or the greedy answer's reward (`greedy`); sigma_j over the
   batch (GDPO, arXiv 2601.05242), not the group (Dr. GRPO, 2503.20783); k1 in the reward (2510.01555).
5. Loss = -sum_k,t A_k,t log pi_theta(y_k,t) / (N K L_max). One update per fresh batch: the ratio is 1, the loss near 0.
6. A truncated sample has no sequence reward, is left out of `loo`; groups with fewer than two left are skipped.

Names: `rba` sequence rewards, `opd` token reward alone, `rba+opd` both. Without flags: rba, then opd.
Reads DIR/data, DIR/sft.pt. Writes DIR/NAME.pt, NAME.config.json, logs/NAME.jsonl, plots/NAME.png.

    python 03_rba_rl.py                                       one process
    torchrun --nproc_per_node 8 03_rba_rl.py --preset small   one node
"""
import json
import math
import re
import time

import common                                             # first: it says in one line what is missing
from common import UserError, derive_seed

import sacrebleu
import torch
from tqdm import tqdm

FLAGS = {"rewards": dict(help="sequence rewards and weights, e.g. semantic=1,task=1, or none"),
         "token-reward": dict(type=float, help="weight w_tok of on-policy distillation"),
         "baseline": dict(help="loo or greedy"), "k": dict(type=int, help="samples per prompt"),
         "temperature": dict(type=float, help="T of pi_theta, pi_ref and pi_T"),
         "beta": dict(type=float, help="weight of the KL to the warm-up"),
         "init": dict(help="checkpoint to start from (default DIR/sft.pt), or none"), "out": dict(help="name of the result"),
         "max-steps": dict(type=int, help="updates"), "batch-size": dict(type=int, help="prompts an update"),
         "micro-tokens": dict(type=int, help="tokens a forward pass; lower it when memory runs out"),
         "lr": dict(type=float, help="peak learning rate")}
REWARDS = ("rm", "semantic", "logp", "task")


# ------------------------------------------------------------------------------------------------------ rewards
def task_reward(item, answer):
    """Token F1 (best alias) for sqa, sentence chrF / 100 for s2tt, none (NaN) for instruct. arXiv 2509.16990 used BLEU."""
    if item["task"] == "sqa":
        return max(common.token_f1(answer, reference) for reference in item["reference"])
    if item["task"] == "s2tt":
        return sacrebleu.sentence_chrf(answer, item["reference"]).score / 100
    return math.nan


class Rewards:
    """The sequence rewards named in `weights`, each (items, answers, answer ids) -> list of floats (NaN: not defined)."""

    def __init__(self, weights, model, teacher, args):
        self.names, self.model, self.teacher, self.args = list(weights), model, teacher, args
        self.embed = common.Embedder(args.embedder, model.device) if "semantic" in weights else None
        self.rm = common.RewardModel(args.reward_model, model.device) if "rm" in weights else None

    def __call__(self, items, answers, ids, taught=None):
        """`taught`: the answers' log pi_T, where they have been computed already."""
        out = {}
        for name in self.names if items else ():
            if name == "semantic":
                both = self.embed([*answers, *(item["response"] for item in items)])
                values = (both[:len(items)] * both[len(items):]).sum(-1).tolist()
            elif name == "task":
                values = [task_reward(item, answer) for item, answer in zip(items, answers)]
            elif name == "rm":
                values = self.rm(items, answers)
            else:
                values = [float(part.mean()) for part in taught or teacher_log_probs(self.model, self.teacher, items, ids, self.args)]
            if len(values) != len(items):
                raise UserError(f"reward {name} gave {len(values)} values for {len(items)} answers")
            bad = [item["id"] for item, value in zip(items, values)
                   if not math.isfinite(value) and not (name == "task" and item["task"] == "instruct")]
            if bad:
                raise UserError(f"reward {name} is not a finite number for item {bad[0]}")
            out[name] = values
        return out or {name: [] for name in self.names}


@torch.no_grad()
def teacher_log_probs(model, teacher, items, answers, args):
    """log pi_T(y_t | x, p, y_<t) of N K answers to N items: list of N K (L_i,) float32."""
    k, parts = len(answers) // max(1, len(items)), []
    sizes = [common.PROMPT_TOKENS + len(item["text"]) // 4 + sum(map(len, answers[i * k:(i + 1) * k])) for i, item in enumerate(items)]
    with common.autocast(model.llm):
        for chunk in common.token_batches(sizes, args.micro_tokens):
            some = answers[chunk.start * k:chunk.stop * k]
            states = teacher.answer_states([items[i] for i in chunk], some)
            parts += common.token_log_probs(*states, args.temperature).split([len(y) for y in some])
    return parts


# ----------------------------------------------------------------------------------------- advantage and loss
def sequence_advantages(rewards, ended, weights, greedy=None):
    """sum_j w_j (R_j,k - b_j,k) / sigma_j, the sequence part of the advantage.

    rewards {j: (N, K) float64, NaN where not defined}; ended (N, K) bool; greedy {j: (N,)} rewards of the greedy
    answers for the `greedy` baseline, None for `loo`. A truncated sample takes no part: its advantage is 0, and it is
    no baseline for the others; with `loo`, a group with fewer than two left is skipped. sigma_j: standard deviation
    (over n) of R_j over all samples of the batch that take part; a reward without spread adds nothing.
    Returns (N, K) float64, {j: (groups skipped, groups without spread)}.
    """
    total, counts = torch.zeros(ended.shape, dtype=torch.float64), {}
    for name, weight in weights.items():
        reward = rewards[name].double()                                                    # (N, K)
        valid = ended & reward.isfinite()                                                  # (N, K)
        value = torch.where(valid, reward, 0.0)
        n = valid.sum(1, keepdim=True)                                                     # (N, 1)
        if greedy is None:
            baseline = (value.sum(1, keepdim=True) - value) / (n - 1).clamp(min=1)         # (N, K) mean of the others
            used = valid & (n >= 2)
        else:
            baseline, used = greedy[name].double()[:, None], valid & greedy[name].isfinite()[:, None]
        if used.any():
            sigma = reward[used].std(correction=0)
            if sigma > 1e-8:
                total += torch.where(used, weight * (value - baseline) / sigma, 0.0)
        low, high = (torch.where(valid, reward, fill) for fill in (math.inf, -math.inf))
        applies = reward.isfinite().any(1)                                                 # (N,) rewards not of this task apart
        counts[name] = (int((applies & ~used.any(1)).sum()),
                        int((applies & used.any(1) & ((high.amax(1) - low.amin(1)) < 1e-8)).sum()))
    return total, counts


def token_advantages(sequence, log_probs, teacher=None, reference=None, token_weight=0.0, beta=0.0):
    """A_t of one sample: its sequence advantage + w_tok r_t - beta * (k1 from t to the end). All (L,), detached."""
    log_probs = log_probs.detach()                                                         # (L,)
    advantage = torch.full_like(log_probs, float(sequence))                                # (L,)
    if token_weight:
        advantage += token_weight * (teacher - log_probs)                                  # r_t, not centred, not scaled
    if beta:
        advantage -= beta * (log_probs - reference).flip(0).cumsum(0).flip(0)              # sum over t' >= t
    return advantage


def policy_loss(log_probs, advantages, n, k, l_max):
    """-sum_k,t A_k,t log pi_theta(y_k,t) / (N K L_max): a constant divisor, so that micro-batches and processes add up."""
    return -sum((a * lp).sum() for a, lp in zip(advantages, log_probs)) / (n * k * l_max)


# ----------------------------------------------------------------------------------------------------- rollout
def rollout(model, items, heard, args, name, step, again):
    """K samples per prompt (and the greedy answer, if it is the baseline), speech heard once per prompt. again: how often each item
    stands earlier in the batch, as at the end of an epoch, so that its samples are others.

    -> samples: N lists of K (ids, ended), greedy: N (ids, ended) or None.
    """
    seeds = [[derive_seed(args.seed, name, step, item["id"], k + args.k * before) for k in range(args.k)] for item, before in zip(items, again)]
    with torch.no_grad(), common.autocast(model.llm):
        prompts = model.speech_prompts(heard, [item["prompt"] for item in items])
        samples = common.sample(model.llm, prompts, model.end_id, args.max_new, seeds, args.temperature)
        greedy = common.sample(model.llm, prompts, model.end_id, args.max_new) if args.baseline == "greedy" else None
    return samples, greedy and [replies[0] for replies in greedy]


def log_probs_of(model, items, heard, answers, prompts, samples, temperature):
    """log pi_theta(y_t | s, p, y_<t) of some samples of some prompts (indices), the same number of each: list of (L,)."""
    vectors = model.speech_prompts([heard[i] for i in prompts], [items[i]["prompt"] for i in prompts])
    some = [answers[s] for s in samples]
    return common.token_log_probs(model.llm, *common.answer_states(model.llm, vectors, some), temperature).split([len(y) for y in some])


# ---------------------------------------------------------------------------------------------------- training
def train(model, teacher, name, weights, token_weight, init, data, args, rank, world):
    """One RL run from `init` to DIR/NAME.pt; resumes from NAME.resume.pt."""
    work, log, resume = args.work, args.work / "logs" / f"{name}.jsonl", args.work / f"{name}.resume.pt"
    (items, heard), steps, k = data, args.rl_steps, args.k
    n, lr = args.rl_prompts, args.distill_lr if token_weight else args.rl_lr
    facts = dict(objective="rl", rewards=weights, token_reward=token_weight, baseline=args.baseline, k=k, beta=args.beta,
                 temperature=args.temperature, init=common.fingerprint(init), steps=steps, prompts=n, lr=lr, max_new=args.max_new,
                 seed=args.seed, data=common.fingerprint(work / "data" / "train.jsonl"))
    config, done = work / f"{name}.config.json", common.is_done(work / f"{name}.pt", work / f"{name}.config.json")
    if not done:                                          # what can't be loaded leaves no configuration behind
        parent, rewards = model.load(init), Rewards(weights, model, teacher, args)
    if rank == 0:
        common.record_config(config, model.config | facts)
    common.barrier()
    if done:
        if rank == 0:
            resume.unlink(missing_ok=True)
            print(f"{name}: done already ({work / name}.pt)")
        return
    model.freeze_reference()                              # pi_ref is the warm-up checkpoint
    optimizer = common.make_optimizer(model)
    first, _, skipped = common.load_resume(resume, model, optimizer, log)
    facts |= dict(history=[*parent.get("history", []), dict(facts)], heard=parent.get("heard", []))
    l_max, own = args.max_new + 1, {}                     # with the end token; {item id: the teacher's own rewards}
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="update", disable=rank > 0)
    for step in bar:
        started = time.time()
        # ---- rollout
        batch = common.batch_at(len(items), n, step, args.seed, "items", len(parent.get("history", [])))
        mine = sorted(range(rank, n, world), key=lambda at: items[batch[at]]["seconds"])
        again, mine = [batch[:at].count(batch[at]) for at in mine], [batch[at] for at in mine]
        rows, sounds = [items[i] for i in mine], [heard[i] for i in mine]
        samples, greedy = rollout(model, rows, sounds, args, name, step, again) if mine else ([], None)
        rollout_seconds = time.time() - started
        # ---- rewards: the samples', the greedy answers', the teacher's own
        flat = [sample for replies in samples for sample in replies]                       # (N K) prompt by prompt
        answers = [ids + [model.end_id] * ended for ids, ended in flat]
        texts = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in flat]
        repeated = [row for row in rows for _ in range(k)]
        taught = teacher_log_probs(model, teacher, rows, answers, args) if teacher else [None] * len(answers)   # (N K) of (L,)
        scores = rewards(repeated, texts, answers, taught)
        new = [row for row in rows if row["id"] not in own]
        found = rewards(new, [row["response"] for row in new], [model.answer_ids(row["response"]) for row in new])
        own |= {row["id"]: {j: found[j][i] for j in weights} for i, row in enumerate(new)}
        if greedy:
            finished = [ended for _, ended in greedy]
            greedy = rewards(rows, [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in greedy],
                             [ids + [model.end_id] * ended for ids, ended in greedy])
            greedy = {j: [v if e else math.nan for v, e in zip(values, finished)] for j, values in greedy.items()}
        # ---- advantage: sigma_j is the whole batch's, so the rewards of all processes are gathered
        everyone = common.gather([(rank, [[scores[j][i * k:(i + 1) * k] for j in weights] for i in range(len(rows))],
                                   [[ended for _, ended in replies] for replies in samples],
                                   [[greedy[j][i] for j in weights] for i in range(len(rows))] if greedy else None)])
        ended = torch.tensor([row for part in everyone for row in part[2]])                # (N, K)
        stacked = torch.tensor([row for part in everyone for row in part[1]], dtype=torch.float64).reshape(n, len(weights), k)
        by_name = {j: stacked[:, at] for at, j in enumerate(weights)}                      # {j: (N, K)}
        base = {j: torch.tensor([row[at] for part in everyone for row in part[3] or ()]) for at, j in enumerate(weights)
                } if args.baseline == "greedy" and weights else None
        advantage, counts = sequence_advantages(by_name, ended, weights, base)             # (N, K)
        offset = sum(len(part[1]) for part in everyone if part[0] < rank)
        # ---- loss: each prompt is computed once for its K samples
        kl = entropy = gap = total = 0.0
        with_kl = args.beta or step % 10 == 0             # with beta 0 the KL is only logged, by one sample of each prompt
        sizes = [common.PROMPT_TOKENS + len(sounds[i]["ids"]) + sum(map(len, answers[i * k:(i + 1) * k])) for i in range(len(rows))]
        order = sorted(range(len(rows)), key=sizes.__getitem__)
        for chunk in common.token_batches([sizes[i] for i in order], args.micro_tokens):
            chosen = [order[at] for at in chunk]
            members = [i * k + j for i in chosen for j in range(k)]
            compared, reference = members[::1 if args.beta else k], {}
            with common.autocast(model.llm):
                if with_kl:
                    with torch.no_grad(), model.as_reference():
                        reference = dict(zip(compared, log_probs_of(model, rows, sounds, answers, chosen, compared, args.temperature)))
                log_probs = log_probs_of(model, rows, sounds, answers, chosen, members, args.temperature)   # K per prompt, each (L,)
                advantages = [token_advantages(advantage[offset + s // k, s % k], lp, taught[s], reference.get(s), token_weight, args.beta)
                              for s, lp in zip(members, log_probs)]
                loss = policy_loss(log_probs, advantages, n, k, l_max)
            loss.backward()
            total += float(loss.detach())
            log_probs = {s: lp.detach() for s, lp in zip(members, log_probs)}
            kl += sum(float((log_probs[s] - r).sum()) for s, r in reference.items()) * (1 if args.beta else k)
            entropy -= sum(float(lp.sum()) for lp in log_probs.values())
            gap += sum(float((taught[s] - lp).sum()) for s, lp in log_probs.items()) if teacher else 0.0
        sums = [sum(column) for column in zip(*common.gather([(total, kl, entropy, gap, sum(map(len, answers)))]))]
        norm = common.optimizer_step(optimizer, common.learning_rate(step, steps, lr), sums[0])
        update_seconds = time.time() - started - rollout_seconds   # rewards and teacher included
        skipped.append(norm is None)
        # ---- log
        parts = common.gather([{j: [own[item["id"]][j] for item in rows] for j in weights}])
        row = dict(step=step, loss=sums[0], grad_norm=norm, kl=sums[1] / (n * k) if with_kl else None, entropy=sums[2] / sums[4],
                   tokens=sums[4] / (n * k), truncated=1 - float(ended.double().mean()),
                   rollout_seconds=round(rollout_seconds, 2), update_seconds=round(update_seconds, 2),
                   tokens_per_second=round(sums[4] / (rollout_seconds + update_seconds), 1))
        if teacher:
            row["token_reward"] = sums[3] / sums[4]       # mean of log pi_T - log pi_theta: minus the reverse KL
        for j in weights:
            valid = by_name[j][ended & by_name[j].isfinite()]
            taught_own = [v for part in parts for v in part[j] if math.isfinite(v)]
            row[j] = dict(mean=float(valid.mean()) if len(valid) else None, std=float(valid.std(correction=0)) if len(valid)
                          else None, teacher=sum(taught_own) / max(1, len(taught_own)), groups_skipped=counts[j][0] / n,
                          groups_without_spread=counts[j][1] / n)
        if rank == 0:
            row["sample"] = dict(id=repeated[0]["id"], text=repeated[0]["text"], prompt=repeated[0]["prompt"],
                                 answer=texts[0], ended=flat[0][1], rewards={j: scores[j][0] for j in weights})
            common.append_jsonl(log, row)
            if (step + 1) % max(1, steps // 4) == 0:
                tqdm.write(f"{name} {step + 1}/{steps}: {json.dumps(row['sample'], ensure_ascii=False)[:240]}")
            if (step + 1) % max(1, min(10, steps // 4)) == 0 and step + 1 < steps:
                common.save_resume(resume, model, optimizer, step + 1, None)
        shown = {j: f"{row[j]['mean']:.3f}" for j in weights if row[j]["mean"] is not None}
        bar.set_postfix(shown | ({"token": f"{row['token_reward']:.3f}"} if teacher else {})
                        | ({"skipped": sum(skipped)} if any(skipped) else {}), tokens=f"{row['tokens']:.0f}")
        common.stop_if_all_skipped(skipped, name, model, work / f"{name}.stopped.pt", **facts)
    if rank == 0:                                         # the checkpoint last: it says that the run is complete
        rows = common.read_jsonl(log)
        plot(rows, weights, work / "plots" / f"{name}.png", name)
        model.save(work / f"{name}.pt", **facts, metrics={j: rows[-1][j]["mean"] for j in weights})
        resume.unlink(missing_ok=True)
    common.barrier()


def plot(rows, weights, path, name):
    """Curves of the run: each reward with the teacher's own, the token reward, KL to the warm-up, length."""
    pyplot = common.pyplot()
    panels = [*weights, *(["token_reward"] if "token_reward" in rows[0] else []), "kl", "tokens"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        steps = [row["step"] + 1 for row in rows]
        if panel in weights:
            axis.plot(steps, [row[panel]["mean"] for row in rows], "k-o", ms=3, label="samples")
            axis.plot(steps, [row[panel]["teacher"] for row in rows], "k--", label="teacher")
            axis.legend(fontsize=7)
        else:
            axis.plot(steps, [row[panel] for row in rows], "k-o", ms=3)
        axis.set(title={"token_reward": "log π_T − log π_θ", "kl": "KL to the warm-up", "tokens": "tokens per answer"
                        }.get(panel, f"reward {panel}"), xlabel="update")
    figure.suptitle(name)
    figure.tight_layout()
    common.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def parse_rewards(text):
    """"semantic=1,task=1" -> {"semantic": 1.0, "task": 1.0}; "none" -> {}."""
    weights = {}
    for entry in filter(None, text.split(",")) if text != "none" else ():
        name, _, value = entry.partition("=")
        if name not in REWARDS or not re.fullmatch(r"\d*\.?\d+", value or "1"):
            raise UserError(f"--rewards {entry}: not NAME=WEIGHT with NAME one of {', '.join(REWARDS)}")
        if name in weights or float(value or 1) == 0:
            raise UserError(f"--rewards {text}: {name} twice or with weight 0; name each reward once, with a weight")
        weights[name] = float(value or 1)
    return weights


def main():
    args = common.parse_args(__doc__, FLAGS)
    for flag, key in (("max_steps", "rl_steps"), ("batch_size", "rl_prompts"), ("lr", "rl_lr"), ("lr", "distill_lr")):
        if flag in args.given:
            setattr(args, key, args.given[flag])
    weights, token_weight = parse_rewards(args.rewards), args.token_reward or 0.0
    if args.baseline not in ("loo", "greedy"):
        raise UserError(f"--baseline {args.baseline}: not one of loo, greedy")
    if args.k < (2 if args.baseline == "loo" and weights else 1):
        raise UserError(f"--k {args.k}: the loo baseline needs at least 2 samples per prompt; use --k 2 or --baseline greedy")
    if args.temperature < 0.01:
        raise UserError(f"--temperature {args.temperature}: must be at least 0.01; there is nothing to learn from K equal answers")
    if not weights and not token_weight:
        raise UserError("no reward: give --rewards, --token-reward or both")
    runs = [("rba", weights, 0.0), ("opd", {}, 1.0)]
    if {"rewards", "token_reward", "baseline", "k", "beta", "temperature", "init", "out"} & args.given.keys():
        name = ("rba+opd" if weights else "opd") if token_weight else "rba"
        runs = [(args.out or name, weights, token_weight)]
    rank, world, device = common.setup_processes()
    init = args.given.get("init", args.work / "sft.pt")
    items = common.read_items(args.work, "train")
    if args.rl_prompts > len(items):
        raise UserError(f"a batch of {args.rl_prompts} prompts is larger than the {len(items)} items of train.jsonl; use a smaller "
                        "--batch-size")
    if str(init) != "none":
        common.load_checkpoint(init, "rba-speechlm-1")    # before the models are loaded: it may be missing
    if rank == 0:
        others = {args.teacher if any(token or "logp" in own for _, own, token in runs) else args.student} - {args.student}
        others |= {args.reward_model} - {"none"} if any("rm" in own for _, own, _ in runs) else set()
        common.print_estimate(args, math.ceil(args.rl_prompts / world) * args.k, others)
    model = common.load_speechlm(vars(args), device)
    data = items, common.listen_to_split(model, args.work, args.work / "data" / "train.jsonl", items,
                                          window=args.window, rank=rank, world=world)
    for name, weights, token_weight in runs:
        teacher = None
        if token_weight or "logp" in weights:
            try:
                teacher = common.Teacher(model, args.teacher)
            except UserError as error:
                if len(runs) == 1:
                    raise
                print(f"{name} is left out: {error}")
            if not all(common.gather([teacher is not None])):   # of all processes alike
                continue
        train(model, teacher, name, weights, token_weight, init, data, args, rank, world)
    if rank == 0:
        common.print_peak()


if __name__ == "__main__":
    common.run(main)
