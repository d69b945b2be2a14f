"""Speed and memory, side by side; run by hand:  pip install trl==1.16.0; python tests/benchmark.py [ROWS]

ROWS: some of rollout, update, memory (default: all). SmolLM2-135M with LoRA, 8 text prompts, answers of 40
tokens; timed is what the stages call. Two ways take turns, updates in processes of their own: medians, ratio.
"""
import importlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402

rl = importlib.import_module("03_rba_rl")
K, ANSWER, TURNS, STEPS = 4, 40, 3, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUESTIONS = ("What is the capital of France?", "Can you tell me a story about a fox?", "Why is the sky blue?",
             "How do birds fly over the ocean at night?", "Where does the river Rhine begin?", "Who are you?",
             "What should I cook for my friends tonight?", "Give me a tip for sleeping better.")
WORDS = "the river house people water green light music story morning time world small great old new".split()


def clock():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function):
    started = clock()
    function()
    return clock() - started


def matmul_rate():
    """FLOP/s of matrix products of the LLM's sizes and precision at 1024 rows."""
    options = dict(dtype=common.native_dtype(), device=DEVICE)
    a, b = torch.randn(1024, 576, **options), torch.randn(576, 1536, **options)

    def multiply():
        for _ in range(200):
            a @ b
    multiply()
    return 200 * 2 * 1024 * 576 * 1536 / statistics.median(timed(multiply) for _ in range(TURNS))


def bench_rollout():
    """K samples of each prompt, all of 40 tokens: common.sample, and transformers' generate on K copies."""
    model, path = common.load_speechlm(common.PRESETS["tiny"], DEVICE), common.resolve("smollm2-135m")
    original = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=common.native_dtype()).to(DEVICE)
    before, after, _ = common.chat_parts(model.tokenizer)
    ids = [before + model.tokenizer(question).input_ids + after for question in QUESTIONS]
    model.tokenizer.pad_token, copies = "<|im_end|>", [row for row in ids for _ in range(K)]
    batch = model.tokenizer.pad({"input_ids": copies}, padding_side="left", return_tensors="pt").to(DEVICE)
    seeds = torch.arange(K * len(ids)).view(-1, K).tolist()

    def ours():
        prompts = [common.embed(model.llm, row) for row in ids]
        common.sample(model.llm, prompts, -1, ANSWER, seeds)

    def theirs():
        original.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                          max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    times = []
    for _ in range(TURNS + 1):
        times.append((timed(ours), timed(theirs)))
    a, b = (len(copies) * ANSWER / statistics.median(own[1:]) for own in zip(*times))
    weights = sum(p.numel() for p in original.parameters())                                # its head's are E
    return [("rollout, tokens/s; `generate` on the expanded batch", a, b),
            ("rollout, GFLOP/s; matrix products alone", 2e-9 * weights * a, 1e-9 * matmul_rate())]


def answer_to(*what):
    """An answer of 40 tokens, its end included."""
    return " ".join(["The", *random.Random(str(what)).choices(WORDS, k=ANSWER - 2)])


def update_of(prompts):
    """03's update of rba-single on text prompts: what calls it, the optimizer included, and its args."""
    model, items, samples = common.load_speechlm(common.PRESETS["tiny"], DEVICE), [], {}
    args = common.parse_args("", rl.FLAGS, ["--objective", "rba-single", "--work", "none"])
    args.max_new = ANSWER
    for i in range(prompts):
        text, y_ref, y = QUESTIONS[i % len(QUESTIONS)], answer_to(i, "y_ref"), answer_to(i, "y")
        items.append(dict(id=i, text=text, prompt="", response=y_ref))
        samples[i] = dict(id=i, answer=y, ids=model.answer_ids(y)[:-1], ended=True, role="negative",
                          logp_y_ref=-99.0, logp_answer=-99.0)                       # any will do here
    heard, batch = [model.read(item["text"]) for item in items], [[i] for i in range(len(items))]
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-4)

    def call():
        rl.backward(model, batch, items, heard, samples, args)
        torch.nn.utils.clip_grad_norm_(model.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return call, args


def turn_ours():
    """Seconds of each update but the first."""
    call, _ = update_of(len(QUESTIONS))
    return [timed(call) for _ in range(STEPS)][1:]


def turn_trl():
    """Seconds of each step of TRL's DPOTrainer but the first, on the same pairs."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    path, rows, seconds = common.resolve("smollm2-135m"), [], []
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, eos_token="<|im_end|>")
    llm = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=common.native_dtype())
    before, after, _ = map(tokenizer.decode, common.chat_parts(tokenizer))
    for i, question in enumerate(QUESTIONS):
        y_ref, y = answer_to(i, "y_ref"), answer_to(i, "y")
        rows.append(dict(prompt=before + question + after, chosen=y_ref, rejected=y))

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = clock()

        def on_step_end(self, *_, **__):
            seconds.append(clock() - self.started)
    bf16, lora = llm.dtype == torch.bfloat16, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    config = DPOConfig(tempfile.mkdtemp(), per_device_train_batch_size=len(rows), max_steps=STEPS, bf16=bf16,
                       learning_rate=1e-4, precompute_ref_log_probs=True, gradient_checkpointing=False,
                       use_cpu=DEVICE == "cpu", save_strategy="no")
    trainer = DPOTrainer(llm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=lora, callbacks=[Clock()])
    assert {len(row["chosen_ids"]) for row in trainer.train_dataset} == {ANSWER}           # as ours
    trainer.train()
    return seconds[1:]


def bench_update():
    found = {"ours": [], "trl": [], "trl-malloc": []}
    for _ in range(TURNS):
        for way, seconds in found.items():
            seconds += in_own_process(f"turn_{way}")
    ours, theirs, malloc = (statistics.median(seconds) for seconds in found.values())
    what, n = "preference update, pairs/s; TRL's DPOTrainer", len(QUESTIONS)
    return [(what, n / ours, n / theirs), (what + " with this repo's malloc settings", n / ours, n / malloc)]


def peak():
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated() / 2 ** 20 if DEVICE == "cuda" else kilobytes / 2 ** 10


def peak_of(whole):
    """MB of an update of 32 utterances above the start; `whole`: one batch, logits not in chunks."""
    call, args = update_of(32)
    if whole:
        common.by_chunks, args.micro_tokens = lambda function, *rows: function(*rows), 10 ** 9
    before = peak()
    call()
    return peak() - before


def bench_memory():
    what = "update of 32 utterances, MB above the start; whole logits in one batch"
    return [(what, in_own_process("peak_ours"), in_own_process("peak_whole"))]


def in_own_process(turn):
    done = subprocess.run([sys.executable, __file__, turn], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


PROCESSES = {"turn_ours": turn_ours, "turn_trl": turn_trl, "turn_trl-malloc": turn_trl,
             "peak_ours": lambda: peak_of(False), "peak_whole": lambda: peak_of(True)}
ROWS = {"rollout": bench_rollout, "update": bench_update, "memory": bench_memory}


def main():
    rows = []
    for name in sys.argv[1:] or ROWS:
        if name in PROCESSES:
            return print("\n" + json.dumps(PROCESSES[name]()))
        rows += ROWS[name]()
    print(f"\n{common.environment()}; {torch.get_num_threads()} threads; {common.native_dtype()}\n")
    print("| what; the other way | this repo | the other way | ratio |\n|---|---|---|---|")
    for what, ours, other in rows:
        print(f"| {what} | {ours:.3g} | {other:.3g} | {ours / other:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:] != ["turn_trl"]:
        common.run(main)
    main()                                                # a user of TRL has not this repo's malloc settings
