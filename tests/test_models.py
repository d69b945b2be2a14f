"""Real models and real speech: what is said is heard, batches change nothing, what is trained acts."""
import copy
import hashlib
import math
import os
import pickle
import struct
import zipfile
from types import SimpleNamespace
from collections import Counter

import gguf
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers
import whisper
from conftest import ROOT, SENTENCES

import common

REQUESTS = ["", "", "Translate what I said into French.", "Answer in one to five words."]


@pytest.fixture(scope="module")
def sounds(model, waves):
    return model.listen(waves, window=12.0)


# ------------------------------------------------------------------------------------------- speech and audio
def test_synthesized_speech_is_transcribed_back(model, waves):
    for window in (30.0, 12.0):                           # the shortened window hears the same
        for text, heard in zip(SENTENCES, common.listen(model.asr, waves, window)):
            assert common.word_errors(text, heard)[0] == 0, (window, text, heard)


def test_the_transcript_is_whispers_own(model, waves):
    """Against whisper's transcribe of each utterance alone."""
    for wave, heard in zip(waves, common.listen(model.asr, waves)):
        said = whisper.transcribe(model.asr, wave.numpy(), language="en", fp16=False, temperature=0.0,
                                  without_timestamps=True)
        assert heard == said["text"].strip()


def test_the_untrained_speechlm_reads_the_transcript(model, sounds):
    table = model.llm.get_input_embeddings().weight
    for row in sounds:
        assert torch.equal(model.hear(row), table[model.tokenizer(row["text"]).input_ids].float())
    assert len(model.hear(model.read(""))) == 0


def test_conditions_do_what_they_say(waves):
    wave = waves[1]
    noisy = common.add_noise(wave, torch.randn(len(wave), generator=torch.Generator().manual_seed(0)), 5.0)
    noise = noisy - wave
    assert 10 * math.log10(wave.square().mean() / noise.square().mean()) == pytest.approx(5, abs=0.01)
    mixed = common.babble(wave, 5.0, torch.Generator().manual_seed(3), waves) - wave
    assert 10 * math.log10(wave.square().mean() / mixed.square().mean()) == pytest.approx(5, abs=0.01)
    click = torch.zeros(common.RATE)
    click[0] = 0.5
    tail = common.perturb(click, "reverb:0.40", 0).square()
    decay = 10 * math.log10(tail[3100:3300].mean() / tail[100:300].mean())                # 3000 samples later
    assert decay == pytest.approx(-60 * (3000 / common.RATE) / 0.40, abs=4)
    assert torch.equal(common.perturb(wave, "clean", 0), wave)
    for condition in ("noise:10", "reverb:0.3", "babble:5"):
        a, b = (common.perturb(wave, condition, 7, waves) for _ in range(2))
        assert torch.equal(a, b) and a.abs().max() <= 1 and len(a) == len(wave), condition
        assert not torch.equal(a, common.perturb(wave, condition, 8, waves)), condition
    for condition in ("speed:2", "noise", "noise:loud", "reverb:0"):
        with pytest.raises(common.UserError, match="not clean, noise:DB"):
            common.parse_condition(condition)


@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 8000, 1), ("flac", 48000, 2), ("ogg", 16000, 1), ("mp3", 22050, 1)])
def test_audio_of_any_kind_is_read(tmp_path, suffix, rate, channels):
    t = np.arange(rate) / rate
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([0.3 * np.sin(2 * np.pi * 440 * t)] * channels, 1), rate)
    wave = common.read_audio(path)
    assert len(wave) == pytest.approx(common.RATE, rel=0.06)
    assert int(torch.fft.rfft(wave).abs().argmax()) * common.RATE / len(wave) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("wave, said", [
    (np.zeros(0), "silent"), (np.full(16000, 0.5), "silent"), (np.full(800, 0.1), "silent"),
    (np.array([np.nan] * 16000), "silent, broken"),
    (np.random.default_rng(0).normal(0, .1, 16000 * 31), "longer than 30")])
def test_audio_that_is_no_speech_is_refused(tmp_path, wave, said):
    soundfile.write(tmp_path / "bad.wav", wave, 16000, "FLOAT")
    with pytest.raises(common.UserError, match=said):
        common.read_audio(tmp_path / "bad.wav")


def test_files_that_are_no_audio_are_refused(tmp_path):
    cut = struct.pack("<4sI4s", b"RIFF", 9, b"WAVE")
    for name, content in (("empty.wav", b""), ("text.wav", b"hello"), ("cut.wav", cut)):
        (tmp_path / name).write_bytes(content)
    for name in ("empty.wav", "text.wav", "cut.wav", "gone.wav"):
        with pytest.raises(common.UserError, match=name):
            common.read_audio(tmp_path / name)


def test_a_segment_is_read_of_a_long_recording(tmp_path):
    """Its own samples alone; one of no length, or behind the end, is refused."""
    wave = np.random.default_rng(0).normal(0, .1, 16000 * 40).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", wave, 16000, "FLOAT")
    segment = common.read_audio(tmp_path / "long.wav", 35.0, 1.5)
    assert torch.equal(segment, torch.from_numpy(wave[35 * 16000:][:24000]))
    for offset, duration in ((35.0, 0.0), (41.0, 1.0)):
        with pytest.raises(common.UserError, match="shorter than 0.1 s"):
            common.read_audio(tmp_path / "long.wav", offset, duration)


# --------------------------------------------------------------------------------- one function for every LLM
def answers_of(model):
    texts = ("The capital of France is Paris.", "Use salt and a hot oven for it.", "Je vais au magasin.",
             "Neil Armstrong.")
    return [[model.answer_ids(text)] for text in texts]


def text_prompts(model):
    """Of the sentences and requests, as typed words: list of (T_i, d)."""
    ids = [common.text_ids(model.tokenizer, *asked) for asked in zip(SENTENCES, REQUESTS)]
    return [common.embed(model.llm, one) for one in ids]


def changes(model):
    """log pi(y_t) with the adapter minus without, of each token: scored with and without gradient."""
    out = {}
    for name, grad in (("learner", True), ("scorer", False)):
        with torch.set_grad_enabled(grad):
            parts = []
            for adapter in (True, False):
                model.adapter.on = adapter
                prompts = text_prompts(model)
                if grad:
                    prompts = [prompt.requires_grad_() for prompt in prompts]
                log_probs = common.token_log_probs(model.llm, prompts, answers_of(model))
                parts.append(torch.cat(log_probs).detach())
            model.adapter.on = True
        out[name] = parts[0] - parts[1]
    return out


@pytest.mark.parametrize("name", ["sft", "rba-single", "rba-group"])
def test_what_is_trained_is_what_acts(restored, monkeypatch, name):
    """Of a shipped checkpoint's change of log pi nothing is lost in the precision that users run: its slope
    on float32's is at least 0.95 in every path (merged into bfloat16 weights it was 0.58)."""
    model, path = restored, ROOT / "assets" / f"{name}.pt"
    model.load(path)
    monkeypatch.setattr(common, "native_dtype", lambda: torch.float32)
    exact = common.SpeechLM(common.PRESETS["tiny"])
    exact.load(path)
    wanted = changes(exact)["scorer"]
    for path, change in changes(model).items():
        assert float(wanted @ change / (wanted @ wanted)) == pytest.approx(1, abs=0.05), path


def test_sampler_learner_and_evaluator_are_one(restored, sounds):
    """The log-probabilities that `sample` drew from are those that the learner gives its tokens, and both are
    near float32's; what `answer` says greedily is what the learner finds likeliest, token by token."""
    model, seen = restored, []
    move(model)
    head = model.llm.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.log_softmax(-1)))
    answers = model.answer(sounds[:1], [""], 24)
    hook.remove()
    y = answers[0].ids + [model.end_id] * answers[0].ended
    acted = torch.stack([row[0, token] for row, token in zip(seen, y)])
    [learnt] = common.token_log_probs(model.llm, model.speech_prompts(sounds[:1], [""]), [[y]])
    learnt = learnt.detach()
    assert float((acted - learnt).abs().mean()) < 0.02 and float((acted - learnt).sum().abs()) < 0.15
    assert answers == model.answer(sounds[:1], [""], 24)


def test_lora_is_w_plus_2_b_a():
    """Value and gradients against a plain linear layer in float64."""
    torch.manual_seed(0)
    linear, adapter = torch.nn.Linear(48, 32, dtype=torch.bfloat16), SimpleNamespace(on=True)
    layer = common.LoRALinear(linear, 4, adapter)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 48).bfloat16().float().requires_grad_()
    w = (linear.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).detach().requires_grad_()
    z, g = x.detach().double().requires_grad_(), torch.randn(5, 32)
    y, wanted = layer(x), F.linear(z, w, linear.bias.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)
    (y * g).sum().backward()
    (wanted * g).sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=2e-2, atol=2e-2)
    slope_b, slope_a = 2 * w.grad @ layer.lora_A.double().T, 2 * layer.lora_B.double().T @ w.grad
    torch.testing.assert_close(layer.lora_B.grad.double(), slope_b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_A.grad.double(), slope_a, rtol=1e-4, atol=1e-4)
    adapter.on = False
    wanted = F.linear(z, linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(layer(x.detach()).double(), wanted, rtol=1e-2, atol=1e-2)


def move(model, size=0.02):
    """W and LoRA away from where they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def student(request, model):
    """A SpeechLM, and transformers' own LLM in float32 with the weights that ours has in bfloat16."""
    path = common.resolve(request.param)
    original = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = common.SpeechLM(common.PRESETS["tiny"] | dict(student=request.param))
    return ours, original


def test_greedy_answers_are_the_original_models(student):
    """Each token is the likeliest under transformers' own float32 model, but for what bfloat16 may turn."""
    model, original = student
    before, after, _ = common.chat_parts(model.tokenizer)
    chats = [before + model.read(text)["ids"] + after for text in SENTENCES]
    prompts = [common.embed(model.llm, ids) for ids in chats]
    replies = common.sample(model.llm, prompts, model.end_id, 24, [[None]] * len(prompts))
    for ids, [(answer, ended)] in zip(chats, replies):
        said = answer + [model.end_id] * ended
        with torch.inference_mode():
            log_p = original(torch.tensor([ids + said])).logits[0, len(ids) - 1:-1].log_softmax(-1)
        assert float((log_p.amax(-1) - log_p[range(len(said)), said]).max()) < 0.15
        assert len(said) > 3


def test_log_probabilities_are_the_original_models_loss(student):
    model, original = student
    table = original.get_input_embeddings()
    with torch.no_grad():
        prompts = text_prompts(model)
        got = common.token_log_probs(model.llm, prompts, answers_of(model))
        for prompt, [y], lp in zip(prompts, answers_of(model), got):
            inputs = torch.cat([prompt, table(torch.tensor(y))])[None]
            labels = torch.tensor([[-100] * len(prompt) + y])
            loss = original(inputs_embeds=inputs, labels=labels).loss
            assert float(-lp.mean()) == pytest.approx(float(loss), abs=0.03)


def test_gemmas_tokenizer_is_the_original():
    """Ids of the published tokenizer; what is decoded is what was written; a line end ends an answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.resolve("gemma3-270m"))
    assert tokenizer("The capital of France is").input_ids == [818, 5279, 529, 7001, 563]
    for text in ("Où est le café naïve, señor?", "two  spaces", "你好 🦜"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    before, after, end = common.chat_parts(tokenizer)
    assert tokenizer.decode(before) == f"<bos>{common.SYSTEM}\n\nUser:\n" and tokenizer.decode([end]) == "\n"
    assert tokenizer.decode(after) == "\n\nAssistant:\n"


def test_gemmas_tokenizer_out_of_a_gguf(tmp_path):
    """Merges by the scores; what a base model samples beside words is not read as one."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "c", "bc", "ab", "▁"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([3, 3, 3, 2, *[1] * 6])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = common._gemma_tokenizer(tmp_path / "model.gguf")
    assert tokenizer("abc ab", add_special_tokens=False).input_ids == [4, 7, 9, 8]         # bc before ab
    assert tokenizer.decode([8, 1, 5], skip_special_tokens=True) == "abb"


def test_text_llm_is_the_base_model_whatever_the_adapter(restored):
    model, prompts = restored, text_prompts(restored)
    with torch.no_grad():
        before = torch.cat(common.token_log_probs(model.llm, prompts, answers_of(model)))
        move(model)
        moved = torch.cat(common.token_log_probs(model.llm, prompts, answers_of(model)))
        model.adapter.on = False
        after = torch.cat(common.token_log_probs(model.llm, prompts, answers_of(model)))
        model.adapter.on = True
    assert torch.equal(before, after) and (moved - before).abs().max() > 0.1


@pytest.fixture(scope="module")
def toy():
    """A random Llama in float32 with grouped heads, and the same with LoRA."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=5, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4)
    plain = transformers.LlamaForCausalLM(config).eval()
    adapted = copy.deepcopy(plain)
    common.adapt(adapted, 2)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return plain, adapted


def merged(plain, adapted):
    """A plain model with W + 2 B A in its layers."""
    plain, parts = copy.deepcopy(plain), dict(adapted.named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and getattr(parts[name], "r", 0):
            layer.weight.data += 2 * parts[name].lora_B.data @ parts[name].lora_A.data
    return plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_behind_one_prompt_are_sequences_of_their_own(toy, checkpointing):
    """Packed log-probabilities and gradients against each (prompt, answer) through the whole plain model with
    merged weights; prompts and numbers of answers unequal; with activation checkpointing the same."""
    plain, adapted = toy
    if checkpointing:
        adapted.model.gradient_checkpointing_enable()
    whole = merged(plain, adapted)
    ids = [[1, 2, 3, 0, 2], [3], [4, 4, 1]]
    answers = [[[1, 4], [2, 2, 2, 4], [0]], [[3, 3, 4]], [[0, 1, 2, 3, 4], [1]]]
    factors = [1.3, -0.7, 0.4, 2.0, -1.1, 0.6]
    got = common.token_log_probs(adapted, [common.embed(adapted, x).requires_grad_() for x in ids], answers)
    sum(f * lp.sum() for f, lp in zip(factors, got)).backward()
    flat = [(x, y) for x, own in zip(ids, answers) for y in own]
    for (x, y), lp, f in zip(flat, got, factors):
        log_p = whole(torch.tensor([x + y])).logits[0, len(x) - 1:-1].log_softmax(-1)[range(len(y)), y]
        torch.testing.assert_close(lp, log_p, rtol=1e-4, atol=1e-5)
        (f * log_p.sum()).backward()
    checked, parts = 0, dict(whole.named_modules())
    for name, layer in adapted.named_modules():
        if getattr(layer, "r", 0):
            slope = 2 * parts[name].weight.grad @ layer.lora_A.T
            torch.testing.assert_close(layer.lora_B.grad, slope, rtol=1e-3, atol=1e-4)
            checked += 1
    assert checked == 14
    adapted.zero_grad()
    adapted.model.gradient_checkpointing_disable()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_sampled_sequences_follow_the_distribution(toy, temperature, top_p):
    """Every sequence of up to three tokens of a vocabulary of five, enumerated; two prompts of unequal
    length, rows that end and leave. top_p: the likeliest tokens that together hold that share."""
    plain, adapted = toy
    whole, prompts, end, n = merged(plain, adapted), [[1, 2, 3, 0, 2], [3]], 4, 3000
    embedded = [common.embed(adapted, ids) for ids in prompts]
    found = common.sample(adapted, embedded, end, 3, [range(n), range(n, 2 * n)], temperature, top_p)
    for ids, replies in zip(prompts, found):
        observed, expected = Counter((*answer, *[end] * ended) for answer, ended in replies), {}

        def enumerate_from(prefix, probability):
            if len(prefix) == 3 or prefix[-1:] == (end,):
                expected[prefix] = n * float(probability)
                return
            p = (whole(torch.tensor([[*ids, *prefix]])).logits[0, -1] / temperature).softmax(-1)
            kept, total = torch.zeros(5), 0.0
            for token in p.argsort(descending=True).tolist():
                if total < top_p:
                    kept[token] = p[token]
                total += float(p[token])
            for token, q in enumerate(kept / kept.sum()):
                enumerate_from((*prefix, token), probability * q)
        with torch.no_grad():
            enumerate_from((), 1.0)
        assert observed.keys() <= {key for key, value in expected.items() if value > 0}
        likely = [key for key, value in expected.items() if value >= 5]
        pairs = [(observed[key], expected[key]) for key in likely]
        pairs.append((n - sum(o for o, _ in pairs), n - sum(e for _, e in pairs)))
        square = sum((o - e) ** 2 / max(e, 1) for o, e in pairs)
        # chi-square, p about 0.001
        assert len(likely) > 5 and square < len(likely) + 3.1 * math.sqrt(2 * len(likely))


@pytest.mark.parametrize("spread", [3.0, 0.01])
def test_top_p_of_a_large_vocabulary(spread):
    """Where a few thousand tokens hold the share, and where nearly all are needed: as numpy's sort has it."""
    logits = spread * torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    uniform, found = torch.tensor([0.0, 0.3, 0.7, 0.999]), []
    for row, u in zip(logits.double().numpy(), uniform.tolist()):
        p = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-p)
        kept = 1 + np.searchsorted(np.cumsum(p[order]), 0.9)
        assert (kept < 8192) == (spread == 3.0)
        cdf = np.cumsum(p[order[:kept]])
        found.append(int(order[np.searchsorted(cdf, u * cdf[-1], side="right")]))
    drawn = common.draw(logits, uniform, 1.0, 0.9)
    ranks = [int((logits[i] > logits[i, token]).sum() - (logits[i] > logits[i, wanted]).sum())
             for i, (token, wanted) in enumerate(zip(drawn, found))]
    assert int(drawn[0]) == found[0] and max(map(abs, ranks)) <= 2   # sums in float32


def test_attention_of_a_gpus_layout(toy, monkeypatch):
    """On a GPU torch's kernels give a transposed buffer: heads and positions must not be confused, nor
    refused."""
    plain = F.scaled_dot_product_attention
    prompts = [common.embed(toy[1], ids) for ids in ([1, 2, 3, 0, 2], [3])]
    before = common.sample(toy[1], prompts, 4, 6, [range(4), range(4, 8)])

    def transposed(*args, **options):
        return plain(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert common.sample(toy[1], prompts, 4, 6, [range(4), range(4, 8)]) == before


def test_a_sample_does_not_depend_on_its_batch(toy):
    prompts = [common.embed(toy[1], ids) for ids in ([1, 2, 3, 0, 2], [3], [4, 4, 1])]
    seeds, alone = [[10 * i + j for j in range(4)] + [None] for i in range(3)], []        # the last greedy
    for prompt, own in zip(prompts, seeds):
        alone += common.sample(toy[1], [prompt], 4, 12, [own])
    assert common.sample(toy[1], prompts, 4, 12, seeds) == alone
    assert common.sample(toy[1], prompts, 4, 12, [[None]] * 3) == [replies[-1:] for replies in alone]
    assert len({tuple(ids) for replies in alone for ids, _ in replies}) > 8


def test_answers_are_the_same_alone_and_permuted(restored, sounds):
    model = restored
    together = model.answer(sounds, REQUESTS, 16)
    alone = [model.answer([sound], [request], 16)[0] for sound, request in zip(sounds, REQUESTS)]
    assert [answer.text for answer in alone] == [answer.text for answer in together]
    order = [2, 0, 3, 1]
    permuted = model.answer([sounds[i] for i in order], [REQUESTS[i] for i in order], 16)
    assert [together[i].text for i in order] == [answer.text for answer in permuted]
    assert len({answer.text for answer in together}) > 1


def test_chat_parts_are_the_chat_template(model):
    before, after, end = common.chat_parts(model.tokenizer, "Be kind.")
    messages = [{"role": "system", "content": common.SYSTEM}, {"role": "user", "content": "hello\nBe kind."}]
    whole = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert model.tokenizer.decode(before + model.tokenizer("hello").input_ids + after) == whole
    assert model.tokenizer.decode([end]) == "<|im_end|>"
    broken = copy.deepcopy(model.tokenizer)
    for template in ("{{ raise_exception('no system role') }}", "{{ messages[0].content }}"):
        broken.chat_template = template
        with pytest.raises(common.UserError, match="its chat template can't be used"):
            common.chat_parts(broken)


def test_gradients_reach_lora_and_nothing_else(restored, sounds):
    model = restored
    prompts = model.speech_prompts(sounds[:1], [""])
    [lp] = common.token_log_probs(model.llm, prompts, [[model.answer_ids("It is Paris.")]])
    lp.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in reached)
    assert reached <= model.trainable().keys()


# ----------------------------------------------------------------------------------------- checkpoints, cache
def test_checkpoints_round_trip_and_foreign_files_are_refused(restored, tmp_path):
    model = restored
    move(model)
    content = {"format": common.CHECKPOINT, "config": model.config, "state": model.state(),
               "history": [{"seed": 0}]}
    common.write_torch(tmp_path / "a.pt", content)
    model.set_state(model.initial)
    assert model.load(tmp_path / "a.pt")["history"] == [{"seed": 0}]
    assert all(torch.equal(value, content["state"][name]) for name, value in model.state().items())

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"format": common.CHECKPOINT, "bomb": Bomb()}, tmp_path / "bomb2.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(content | {"config": content["config"] | {"lora_r": 4}}, tmp_path / "smaller.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    for name in ("bomb", "bomb2", "other", "smaller", "cut", "missing"):
        with pytest.raises(common.UserError, match=name):
            model.load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "executed").exists()


def test_a_wheel_with_another_checksum_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("RBA_CACHE", str(tmp_path / "cache"))

    def fake_download(command, **_):                      # a stub: the failure must be forced
        with zipfile.ZipFile(command[command.index("-d") + 1] / "toy-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy/data.bin", b"replaced")
        return type("Done", (), {"returncode": 0, "stderr": ""})()
    monkeypatch.setattr(common.subprocess, "run", fake_download)
    monkeypatch.setitem(common.EMBEDDED, "toy", (["toy==1"], {"data.bin": (["toy/data.bin"], "0" * 64)}))
    with pytest.raises(common.UserError, match="sha256"):
        common.resolve("toy")
    assert os.listdir(tmp_path / "cache") == ["toy.lock"]
    good = hashlib.sha256(b"replaced").hexdigest()
    monkeypatch.setitem(common.EMBEDDED, "toy", (["toy==1"], {"data.bin": (["toy/data.bin"], good)}))
    with open(common.resolve("toy") + "/data.bin", "rb") as file:
        assert file.read() == b"replaced"


def test_embeddings_tell_likeness():
    a, b, c = common.Embedder("minilm-l6")([
        "How do I bake bread?", "Tell me how bread is baked.", "The stock market fell."])
    assert float(a @ a) == pytest.approx(1, abs=1e-5) and float(a @ b) > 0.7 > 0.3 > float(a @ c)
