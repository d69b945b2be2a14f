"""Speed and memory, side by side; run by hand:  pip install trl==1.16.0; python tests/benchmark.py [ROWS]

Each row does the same work in two ways, in turns: medians and their ratio. ROWS: some of rollout, step, memory, synthesis
(default: all). SmolLM2-135M with LoRA, K = 4, answers of at most 40 tokens, 8 prompts an update; everything else is the
tiny preset's. The RL steps are those of 03_rba_rl.py's own `train` and of TRL's GRPOTrainer, unchanged; as each way of a step or of
an update changes the process it runs in (allocator, threads), each has processes of its own.
"""
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

import soundfile  # noqa: E402
import torch  # noqa: E402
import torchaudio  # noqa: E402

K, ANSWER, PROMPTS, REPEATS = 4, 40, 8, 3
WORDS = ("What is the capital of France and why is it so large?", "Can you tell me a story about a fox?", "How do birds fly over the ocean at night?",
         "Where does the river Rhine begin?", "What should I cook for my friends tonight?", "Why is the sky blue in the morning?",
         "Give me a tip for sleeping better.", "Who was the first person to walk on the moon?")
rl, synthesis = (importlib.import_module(name) for name in ("03_rba_rl", "01_synthesize"))


def timed(function):
    """-> seconds, result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time() - started, result


def table(rows):
    print("\n| what | this repo | the other way | ratio |\n|---|---|---|---|")
    for what, ours, other, ratio in rows:
        print(f"| {what} | {ours} | {other} | {ratio} |", flush=True)


def matmul_rate():
    """FLOP/s of bfloat16 (or the LLM's own type) matrix products of the LLM's sizes at 1024 rows."""
    kind, device = common.native_dtype(), "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(1024, 576, dtype=kind, device=device), torch.randn(576, 1536, dtype=kind, device=device)
    a @ b
    seconds, _ = timed(lambda: [a @ b for _ in range(200)])
    return 200 * 2 * 1024 * 576 * 1536 / seconds


def body_size(model):
    """Parameters of the LLM's layers, and of its head."""
    head = model.llm.get_output_embeddings().weight.numel()
    return sum(p.numel() for n, p in model.llm.named_parameters() if "lora" not in n) - head, head


def bench_rollout(model):
    """(a) K samples of each prompt, all of 40 tokens: ours, and transformers' generate on the batch expanded to K copies."""
    chats = [common.chat_parts(model.tokenizer) for _ in WORDS]
    ids = [before + model.tokenizer(words).input_ids + after for words, (before, after, _) in zip(WORDS, chats)]
    width, device = max(map(len, ids)), model.device
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device).repeat_interleave(K, 0)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device).repeat_interleave(K, 0)
    embed = model.llm.get_input_embeddings()

    def ours():
        prompts = [embed(torch.tensor(row, device=device)) for row in ids]
        with common.autocast(model.llm), torch.no_grad():
            return common.sample(model.llm, prompts, -1, ANSWER, [[K * i + k for k in range(K)] for i in range(len(ids))])

    def theirs():
        with common.autocast(model.llm), torch.no_grad():
            return model.llm.generate(padded, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                      max_new_tokens=ANSWER, min_new_tokens=ANSWER, pad_token_id=0)
    times = {way: [] for way in (ours, theirs)}
    for _ in range(REPEATS + 1):
        for way in times:
            times[way].append(timed(way)[0])
    a, b = (len(ids) * K * ANSWER / statistics.median(times[way][1:]) for way in (ours, theirs))
    body, head = body_size(model)
    flops, limit = 2 * (body + head) * a, matmul_rate()
    return [("(a) rollout, tokens/s (`generate`, batch expanded)", f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}"),
            ("(e) rollout, GFLOP/s; bf16 matrix products", f"{flops / 1e9:.0f}", f"{limit / 1e9:.0f}", f"{flops / limit:.2f}")]


def write_items(work, voices):
    """The questions as items of a working directory, spoken: what 03 trains on."""
    (work / "data" / "audio").mkdir(parents=True)
    items = []
    for i, words in enumerate(WORDS):
        wave, rate = voices.say("piper-joe", words, 1.0)
        wave = torchaudio.functional.resample(torch.from_numpy(wave), rate, common.RATE)
        soundfile.write(work / "data" / "audio" / f"{i}.wav", wave.numpy(), common.RATE)
        items.append(dict(id=f"q{i}", task="sqa", text=words, prompt="", response="It is a large city in Europe.", reference=["a large city"],
                          audio=f"audio/{i}.wav", seconds=len(wave) / common.RATE, voice="piper-joe", condition="clean"))
    common.write_jsonl(work / "data" / "train.jsonl", items)
    return items


def our_steps(model, work, name, items, heard, steps, teacher=None):
    """Seconds of each step of 03's `train` but the first (it warms up, and logs the KL, as every tenth does: 1 % of the time), the
    tokens of each step's answers, log rows."""
    args = common.parse_args("", rl.FLAGS, ["--work", str(work)])
    args.rl_steps, args.rl_prompts, args.max_new, args.beta = steps, PROMPTS, ANSWER, 0.0
    rl.train(model, teacher, name, {"task": 1.0}, 0.1 if teacher else 0.0, "none", (items, heard), args, 0, 1)
    rows = common.read_jsonl(work / "logs" / f"{name}.jsonl")
    return [row["rollout_seconds"] + row["update_seconds"] for row in rows][1:], [row["tokens"] for row in rows], rows[1:]


def trl_trainer(items, folder, steps):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    tokenizer, llm = common.load_llm("smollm2-135m")
    seconds, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.time()

        def on_step_end(self, *_, **__):
            seconds.append(time.time() - self.started)

        def on_log(self, args, state, control, logs=None, **__):
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])
    data = Dataset.from_list([dict(prompt=[dict(role="system", content=common.SYSTEM), dict(role="user", content=item["text"])],
                                   reference=item["reference"]) for item in items])
    config = GRPOConfig(output_dir=str(folder), per_device_train_batch_size=PROMPTS * K, num_generations=K, max_completion_length=ANSWER,
                        max_steps=steps, beta=0.0, temperature=1.0, learning_rate=2e-4, gradient_checkpointing=False, logging_steps=1,
                        bf16=common.native_dtype() == torch.bfloat16, use_cpu=not torch.cuda.is_available(), save_strategy="no",
                        report_to=[], disable_tqdm=True, seed=0)

    def reward(completions, reference, **_):
        return [max(common.token_f1(said[0]["content"], r) for r in refs) for said, refs in zip(completions, reference)]
    trainer = GRPOTrainer(model=llm, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer,
                          peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), callbacks=[Clock()])
    return trainer, seconds, lengths


def one_turn(way, folder):
    """`steps` RL steps of ours ("text", then "speech") or of TRL's -> JSON of seconds and tokens an answer, FLOP/s of our updates."""
    work, steps = Path(folder), 4
    items = common.read_jsonl(work / "data" / "train.jsonl")
    if "trl" in way:
        trainer, seconds, lengths = trl_trainer(items, work / "trl", steps)
        trainer.train()
        return dict(trl=dict(seconds=seconds[1:], tokens=lengths))
    model = common.SpeechLM(common.PRESETS["tiny"], "cuda" if torch.cuda.is_available() else "cpu")
    waves = [common.read_audio(work / "data" / item["audio"]) for item in items]
    model.listen(waves, 9.0)
    listening, heard = timed(lambda: model.listen(waves, 9.0))
    words = [model.tokenizer(item["text"]).input_ids for item in items]
    written = [dict(text=item["text"], ids=ids, states=torch.zeros(len(ids), heard[0]["states"].shape[1]).half())
               for item, ids in zip(items, words)]        # with W = 0 these are the prompts of the text LLM
    seconds, tokens, log = our_steps(model, work, "text", items, written, steps)
    body, head = body_size(model)
    # forward and the gradient of the input, 4 operations a weight and token: weights are frozen; LoRA and attention apart
    prompt = sum(map(len, words)) + PROMPTS * sum(map(len, common.chat_parts(model.tokenizer)[:2]))
    flops = [4 * (body * (prompt + K * PROMPTS * row["tokens"]) + head * K * PROMPTS * row["tokens"]) / row["update_seconds"] for row in log]
    out = dict(text=dict(seconds=seconds, tokens=tokens, flops=flops))
    seconds, tokens, _ = our_steps(model, work, "speech", items, heard, steps, common.Teacher(model, "smollm2-135m"))
    return out | dict(speech=dict(seconds=[s + listening for s in seconds], tokens=tokens, listening=[listening]))


def bench_step():
    """(b) whole RL steps; (e) the update's FLOP/s."""
    import trl
    found = {}
    for _ in range(REPEATS):
        for way in ("ours", "trl", "trl malloc"):         # a user of TRL has not this repo's malloc settings (common.run)
            with tempfile.TemporaryDirectory() as folder:
                write_items(Path(folder), synthesis.Voices("piper-joe"))
                for name, values in in_own_process("one_turn", way, folder).items():
                    row = found.setdefault(name + " malloc" * ("malloc" in way), {})
                    for key, some in values.items():
                        row.setdefault(key, []).extend(some)
    rate = {name: PROMPTS * K / statistics.median(row["seconds"]) for name, row in found.items()}
    mean = {name: f"{statistics.mean(row['tokens']):.0f}" for name, row in found.items()}
    listening, update, limit = statistics.median(found["speech"]["listening"]), statistics.median(found["text"]["flops"]), matmul_rate()
    whole = (f"(b) RL step on speech: Whisper on its {PROMPTS} utterances ({listening:.1f} s) and the teacher's token reward included; "
             f"tokens {mean['speech']} and {mean['trl']}")
    return [(what + note, f"{rate[ours]:.2f}", f"{rate[other]:.2f}", f"{rate[ours] / rate[other]:.2f}")
            for other, note in (("trl", ""), ("trl malloc", "; TRL with this repo's malloc settings"))
            for ours, what in (("text", f"(b) RL step on text, samples/s (TRL {trl.__version__}; tokens an answer {mean['text']} and {mean['trl']})"),
                               ("speech", whole))
            ] + [("(e) update, GFLOP/s; bf16 matrix products", f"{update / 1e9:.0f}", f"{limit / 1e9:.0f}", f"{update / limit:.2f}")]


def in_own_process(*command):
    """The JSON that this script prints last with that command line."""
    done = subprocess.run([sys.executable, __file__, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_update(way):
    """Peak MB of one update of 8 prompts x K answers of 40 tokens above what stands in memory before: `whole` logits or ours."""
    model = common.SpeechLM(common.PRESETS["tiny"])
    embed, device = model.llm.get_input_embeddings(), model.device
    chats = [common.chat_parts(model.tokenizer)[0] + model.tokenizer(words).input_ids for words in WORDS]
    answers = torch.randint(49000, (PROMPTS * K, ANSWER), generator=torch.Generator().manual_seed(0)).tolist()

    def log_probs(llm, states, ids):
        if way == "ours":
            return common.token_log_probs(llm, states, ids)
        return llm.get_output_embeddings()(states).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def update(chunk):
        with common.autocast(model.llm):
            prompts = [embed(torch.tensor(chats[i], device=device)) for i in chunk]
            some = answers[chunk.start * K:chunk.stop * K]
            if way == "whole":                            # the usual way: each sample with its prompt
                prompts = [prompt for prompt in prompts for _ in range(K)]
            loss = -log_probs(model.llm, *common.answer_states(model.llm, prompts, some)).sum()
        loss.backward()
    for chunk in common.token_batches([len(chat) + K * ANSWER for chat in chats], 1024) if way == "ours" else [range(PROMPTS)]:
        if chunk.start == 0:
            embed(torch.zeros(1, dtype=torch.long, device=device))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        update(chunk)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def bench_memory():
    """(c), each way in a process of its own."""
    peak = [in_own_process("one_update", way) for way in ("ours", "whole")]
    return [("(c) peak memory of the update, MB above the start (whole logits, one batch)", *map(str, peak), f"{peak[0] / peak[1]:.2f}")]


def bench_synthesis(model):
    """(d) no other way to compare with: rates of stage 1's own functions."""
    teacher, args = synthesis.LocalTeacher("smollm2-135m", model.device), common.parse_args("", synthesis.FLAGS, [])
    seconds, rows = timed(lambda: [row for stream in common.TASKS for row in
                                   synthesis.write_texts(teacher, stream, 0, args)])
    kept = [row for row in rows if not row["dropped"]]
    voices = synthesis.Voices("piper-joe")
    voices.say("piper-joe", "Hello.", 1.0)
    speaking, spoken = timed(lambda: [voices.say("piper-joe", row["text"], 1.0) for row in kept[:64]])
    waves = [torchaudio.functional.resample(torch.from_numpy(wave), rate, common.RATE) for wave, rate in spoken]
    length = sum(map(len, waves)) / common.RATE
    listening, _ = timed(lambda: model.listen(waves, 12.0))
    return [("(d) instructions with answers/s, after the filters", f"{len(kept) / seconds:.1f}", "", ""),
            ("(d) Piper, seconds of speech/s", f"{length / speaking:.0f}", "", ""),
            ("(d) Whisper tiny.en, seconds of speech/s", f"{length / listening:.0f}", "", "")]


def main():
    if sys.argv[1:2] in (["one_update"], ["one_turn"]):
        return print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    chosen = sys.argv[1:] or ["rollout", "step", "memory", "synthesis"]
    rows = bench_memory() if "memory" in chosen else []
    rows += bench_step() if "step" in chosen else []
    model = common.SpeechLM(common.PRESETS["tiny"], "cuda" if torch.cuda.is_available() else "cpu")
    rows += bench_rollout(model) if "rollout" in chosen else []
    rows += bench_synthesis(model) if "synthesis" in chosen else []
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {common.importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads of {cpu}"
    print(f"\n{device}; {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; {common.native_dtype()}; medians of {REPEATS} turns")
    table(rows)


if __name__ == "__main__":
    (main if sys.argv[1:3] == ["one_turn", "trl"] else lambda: common.run(main))()   # ours as the stages are: with their malloc settings
