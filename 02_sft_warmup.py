"""Stage 2: supervised fine-tuning of the SpeechLM on the teacher's responses, and the baselines at RBA's
budget.

- sft [paper, Eq. 1]: L_CE = -(1/S) sum_s sum_t log pi_theta(y_ref,t | x^(s), y_ref,<t), over the S voices of
  an instruction: summed over the answer's tokens, averaged over utterances: [ours] an instruction in four
  voices weighs four times one in one (sqa). The baseline, and what RBA starts from.
- sft+ [ours]: more of the same from sft.pt, in stage 3's batches: give both the same flags.
- kd [ours]: sum_t KL(pi_T(. | x, p, y_ref,<t) || pi_theta(. | x^(s), p, y_ref,<t)), reduced alike, from
  sft.pt with the same budget; where teacher and student share their token ids.

Without --objective: sft, sft+ and, where teacher and student are one model, kd. The last update is what is
kept [ours]: the paper chooses by validation, and the likelihood of y_ref chooses badly.

Reads DIR/data. Writes DIR/NAME.pt, NAME.config.json, logs/NAME.jsonl, plots/NAME.png; heard/ keeps what
Whisper made of the speech.

    python 02_sft_warmup.py                                       one process
    torchrun --nproc_per_node 8 02_sft_warmup.py --work small     one node: the same gradients
"""
import common                                             # first: it says in one line what is missing
from common import UserError

import functools
import itertools

import torch

FLAGS = {"objective": dict(choices=("sft", "sft+", "kd"), help="this one alone")} | common.TRAIN_FLAGS


# ------------------------------------------------------------------------------------------------- objectives
def cross_entropy(model, items, heard):
    """Eq. 1 before its average: -sum_t log pi_theta(y_ref,t | x^(s), y_ref,<t) of each utterance, (N,)."""
    prompts = model.speech_prompts(heard, [item["prompt"] for item in items])
    answers = [[model.answer_ids(item["response"])] for item in items]
    log_probs = common.token_log_probs(model.llm, prompts, answers)                        # N of (L,)
    return torch.stack([-lp.sum() for lp in log_probs])


def kl_rows(teacher_logits, student_logits):
    """KL(pi_T || pi_theta) per row over the vocabulary both have. (rows, V_T), (rows, V_S) -> (rows,)."""
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])                   # padded sizes may differ
    log_t = teacher_logits[:, :size].log_softmax(-1)                                       # (rows, V)
    log_s = student_logits[:, :size].log_softmax(-1)                                       # (rows, V)
    return (log_t.exp() * (log_t - log_s)).sum(-1)                                         # (rows,)


def load_teacher(model, name):
    """pi_T: the SpeechLM's own LLM, read with LoRA off, where the two are one; else its own weights."""
    if name == model.config["student"]:
        return model.llm
    tokenizer, llm = common.load_llm(name, model.device)
    if tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise UserError(f"kd: teacher {name} and student {model.config['student']} have different token ids; "
                        "use --objective sft or sft+")
    return llm


def distillation(model, teacher, items, heard):
    """KL(pi_T || pi_theta) summed over y_ref's positions of each utterance, (N,); only these positions of the
    two prompts line up. pi_T reads the true words. Behind the opening of sqa's answers, the item's, it ends
    with a quotation mark, the student with its end token: that position is left out."""
    requests, texts = [item["prompt"] for item in items], []
    answers = [[model.answer_ids(item["response"])] for item in items]
    model.adapter.on = False
    with torch.no_grad():
        for item in items:
            ids = common.text_ids(model.tokenizer, item["text"], item["prompt"], item["opening"])
            texts.append(common.embed(teacher, ids))
        taught, _, _ = common.answer_states(teacher, texts, answers)                       # (sum L, d_T)
    model.adapter.on = True
    states, _, lengths = common.answer_states(model.llm, model.speech_prompts(heard, requests), answers)
    teacher_head, head = teacher.get_output_embeddings(), model.llm.get_output_embeddings()
    rows = common.by_chunks(lambda h, t: kl_rows(teacher_head(t), head(h)), states, taught)   # (sum L,)
    parts = zip(rows.split(lengths), items)
    return torch.stack([part[:-1].sum() if item["opening"] else part.sum() for part, item in parts])   # (N,)


# --------------------------------------------------------------------------------------------------- training
def train(model, items, heard, run, args, loss_of, batches):
    """Updates of `loss_of(items, heard)` (N,), averaged over the utterances of a batch of groups."""
    groups, answer_tokens, sizes = common.groups_of(items), [], []
    for item, row in zip(items, heard):
        answer_tokens.append(len(model.answer_ids(item["response"])))
        sizes.append(common.PROMPT_TOKENS + len(row["ids"]) + answer_tokens[-1])
    for step in run.updates():
        batch = list(itertools.chain(*(groups[g] for g in batches[step])))
        mine, total = sorted(batch[common.rank()::common.world()], key=sizes.__getitem__), 0.0
        lengths = [sizes[i] for i in mine]
        for chunk in common.token_batches(lengths, args.micro_tokens):
            chosen = [mine[at] for at in chunk]
            losses = loss_of([items[i] for i in chosen], [heard[i] for i in chosen])       # (n,)
            loss = losses.sum() / len(batch)           # a global constant: micro-batches and processes add up
            loss.backward()
            total += float(loss.detach())
        tokens = sum(answer_tokens[i] for i in batch)
        total = sum(common.gather([total]))
        run.update({"loss": total, "loss_per_token": total * len(batch) / tokens, "utterances": len(batch)})
    run.finish([["loss_per_token"], ["held_out/logps_y_ref"], ["held_out/kl"], ["held_out/tokens"]])


def main():
    args = common.parse_args(__doc__, FLAGS)
    if (args.init or args.out) and not args.objective:
        raise UserError("--init and --out are for one --objective; without it the names are fixed")
    device = common.setup_processes()
    objectives = [args.objective] if args.objective else ["sft", "sft+", "kd"]
    if not args.objective and args.teacher != args.student:
        objectives.remove("kd")                           # other token ids, or a served teacher
    items = common.read_items(args.work, "train")
    model = common.load_speechlm(vars(args), device)
    heard = common.listen_to_split(model, args.work, "train", items, window=args.window)
    held_out = common.HeldOut(model, args, common.Reward(args, device))
    for objective in objectives:
        first = objective == "sft"
        init = args.init or ("none" if first else args.work / "sft.pt")
        steps = args.max_steps or (args.sft_steps if first else args.rl_steps)
        size = args.batch_size or (args.sft_batch if first else args.rl_batch)
        loss_of = functools.partial(cross_entropy, model)
        if objective == "kd":
            loss_of = functools.partial(distillation, model, load_teacher(model, args.teacher))
        run = common.Run(model, args, args.out or objective, init, steps, held_out, objective=objective,
                         batch_size=size)
        if not run.done:
            order = "sft" if first else "groups"          # of sft+ and kd as of 03
            batches = common.batches(len(common.groups_of(items)), size, steps, args.seed, order)
            train(model, items, heard, run, args, loss_of, batches)


if __name__ == "__main__":
    common.run(main)
