"""Real models and real speech: what is said is heard, batches change nothing, log-probabilities are the model's own."""
import contextlib
import copy
import math
import os
import pickle
import struct
import zipfile
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import SENTENCES, stage

import common

REQUESTS = ["", "", "Translate what I said into French.", "Answer in one short sentence."]


@pytest.fixture(scope="module")
def sounds(model, waves):
    return model.listen(waves, window=12.0)


# ------------------------------------------------------------------------------------------------- speech and audio
def test_synthesized_speech_is_transcribed_back(model, waves):
    for window in (30.0, 12.0):                           # the shortened window hears the same
        for text, heard in zip(SENTENCES, common.listen(model.asr, waves, window)):
            assert common.word_errors(text, heard["text"])[0] == 0, (window, text, heard["text"])
            assert heard["states"].shape == (len(heard["tokens"]), 384)


def test_states_are_those_that_wrote_the_transcript(model, waves, sounds):
    """Against whisper's own transcribe and a token-by-token run of its decoder over each utterance alone."""
    tokenizer = common.whisper_tokenizer(model.asr)
    for wave, heard in zip(waves, common.listen(model.asr, waves)):
        assert heard["text"] == whisper.transcribe(model.asr, wave.numpy(), language="en", fp16=False, temperature=0.0,
                                                   without_timestamps=True)["text"].strip()
        encoded = model.asr.encoder(whisper.log_mel_spectrogram(whisper.pad_or_trim(wave), 80)[None])
        head, prefix = model.asr.decoder.token_embedding.weight, list(tokenizer.sot_sequence_including_notimestamps)
        for token, state in zip(heard["tokens"], heard["states"]):
            logits = model.asr.decoder(torch.tensor([prefix]), encoded)[0, -1]
            torch.testing.assert_close(head @ state.float(), logits, rtol=2e-2, atol=5e-2)   # kept as float16
            assert int(logits[:tokenizer.eot].argmax()) == token
            prefix.append(token)
    batch = common.listen(model.asr, waves, 12.0)         # padding changes nothing
    for alone, together in zip((common.listen(model.asr, [wave], 12.0)[0] for wave in waves), batch):
        assert alone["tokens"] == together["tokens"]
        torch.testing.assert_close(alone["states"], together["states"], rtol=1e-2, atol=1e-2)


def test_whisper_does_not_repeat_itself_endlessly(model):
    """An utterance on which Whisper's decoder loops in the short window: 91 words for 11 before it got the full one."""
    synthesize = stage("01_synthesize")
    item = dict(text="The building has heavy seismic loads to provide safety from earthquakes.", seed=4542988587387902846, split="test")
    voices, unheard = (synthesize.Voices(common.PRESETS["tiny"][name]) for name in ("voices", "unheard_voices"))
    [(wave, voice, _)] = synthesize.speak(voices, unheard, [item])
    [heard] = common.listen(model.asr, [wave], 12.0)
    assert voice == "kokoro-jf_nezumi" and common.word_errors(item["text"], heard["text"])[0] <= 2


def test_every_token_of_the_llm_has_the_states_that_wrote_it(model, monkeypatch):
    """Against a character by character assignment, with states that name their token; accents and odd splits included."""
    tokenizer = common.whisper_tokenizer(model.asr)
    texts = ["Who was Tchaikovsky's teacher in 1865?", "Où est le café naïve, señor?", "Antidisestablishmentarianism, um,  now!", "é", ""]

    def stub(asr, waves, window):                         # chosen transcripts instead of speech
        rows = [tokenizer.encode(" " + text if text else "") for text in texts]
        return [dict(text=text, skipped=1, tokens=row, states=torch.eye(64)[:len(row)].half()) for text, row in zip(texts, rows)]
    monkeypatch.setattr(common, "listen", stub)
    for text, heard in zip(texts, model.listen(texts)):
        pieces = [tokenizer.encoding.decode_single_token_bytes(t) for t in tokenizer.encode(" " + text if text else "")]
        mine = model.tokenizer(text, return_offsets_mapping=True)
        assert heard["ids"] == mine["input_ids"] and len(heard["states"]) == len(heard["ids"])
        for (a, z), state in zip(mine["offset_mapping"], heard["states"]):
            first, last = (len((" " + text)[:1 + at].encode()) for at in (a, z))
            at, wanted = 0, []
            for i, piece in enumerate(pieces):
                if at < last and at + len(piece) > first:
                    wanted.append(i)
                at += len(piece)
            assert state.nonzero()[:, 0].tolist() == wanted and wanted
            assert state.sum() == pytest.approx(1, abs=1e-2)


def test_the_untrained_speechlm_reads_what_the_cascade_reads(model, sounds):
    """W = 0: the vectors are the transcript's own embeddings; with a W: plus W h, in float64."""
    head = model.llm.get_input_embeddings().weight
    for row, vectors in zip(sounds, model.hear(sounds)):
        assert torch.equal(vectors, head[model.tokenizer(row["text"]).input_ids])
    w = torch.randn(model.bridge.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    with torch.no_grad():
        model.bridge.weight.copy_(w)
        got = model.hear(sounds)
        model.bridge.weight.zero_()
    for row, vectors in zip(sounds, got):
        wanted = head[row["ids"]].double() + torch.stack([w @ state for state in row["states"].double()])
        torch.testing.assert_close(vectors.double(), wanted, rtol=1e-4, atol=1e-4)
    silent = dict(text="", ids=[], states=torch.zeros(0, 384).half())
    assert [len(v) for v in model.hear([silent, sounds[0]])] == [0, len(sounds[0]["ids"])]


def test_kokoro_speaks_too(model):
    item = dict(text=SENTENCES[0], seed=1, split="train")
    voices = stage("01_synthesize").Voices("kokoro-jf_alpha")
    [(wave, voice, _)] = stage("01_synthesize").speak(voices, voices, [item])
    assert voice == "kokoro-jf_alpha" and 1 < len(wave) / common.RATE < 6
    [heard] = common.listen(model.asr, [wave], 12.0)
    assert common.word_errors(item["text"], heard["text"])[0] <= 1


def test_a_speech_item_is_drawn_from_its_seed():
    synthesize = stage("01_synthesize")
    voices, other_voices = synthesize.Voices("piper-joe"), synthesize.Voices("kokoro-jf_nezumi")
    first, again, other = synthesize.speak(voices, other_voices, [dict(text=SENTENCES[1], seed=seed, split="train") for seed in (5, 5, 6)], 2)
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:] and first[2] != other[2]
    tests = synthesize.speak(voices, other_voices, [dict(text=SENTENCES[2], seed=seed, split="test") for seed in range(8)])
    assert {voice for _, voice, _ in tests} == {"piper-joe", "kokoro-jf_nezumi"}        # unheard voices, only here
    assert {described.split()[0] for _, _, described in tests} == {"clean"}


def test_conditions_do_what_they_say(waves):
    wave = waves[1]
    for snr in (20.0, 5.0):
        noisy = common.at_snr(wave, torch.randn(len(wave), generator=torch.Generator().manual_seed(0)), snr)
        assert 10 * math.log10(wave.square().mean() / (noisy - wave).square().mean()) == pytest.approx(snr, abs=0.01)
    click = torch.zeros(common.RATE)
    click[0] = 0.5
    tail = common.perturb(click, "reverb:0.40", 0).square()
    decay = 10 * math.log10(tail[3100:3300].mean() / tail[100:300].mean())                 # 3000 samples later
    assert decay == pytest.approx(-60 * (3000 / common.RATE) / 0.40, abs=4)
    spectrum = torch.fft.rfft(common.perturb(wave, "band:2500", 0)).abs() / torch.fft.rfft(wave).abs().clamp(min=1e-6)
    hertz = torch.fft.rfftfreq(len(wave), 1 / common.RATE)
    assert spectrum[(hertz > 300) & (hertz < 1000)].median() > 0.9 and spectrum[hertz > 6000].median() < 0.2
    assert torch.equal(common.perturb(wave, "clean", 0), wave)
    for condition in ("noise:10", "reverb:0.3", "band:3000", "babble:5", "speed:1.5", "loss:10", "disfluency:2"):
        a, b = (common.perturb(wave, condition, 7, waves) for _ in range(2))
        assert torch.equal(a, b) and a.abs().max() <= 1 and (len(a) == len(wave) or condition[0] in "sd"), condition
        assert condition[0] in "sb" or not torch.equal(a, common.perturb(wave, condition, 8, waves)), condition
    mixed = common.babble(wave, 5.0, torch.Generator().manual_seed(3), waves) - wave
    assert 10 * math.log10(wave.square().mean() / mixed.square().mean()) == pytest.approx(5, abs=0.01)


def test_speed_keeps_the_pitch_and_loss_its_share(waves):
    t = torch.arange(2 * common.RATE) / common.RATE
    tone = 0.5 * torch.sin(2 * math.pi * 440 * t)
    for factor in (0.75, 1.25, 1.5):
        out = common.perturb(tone, f"speed:{factor}", 0)
        assert len(out) == round(len(tone) / factor)
        assert int(torch.fft.rfft(out).abs().argmax()) * common.RATE / len(out) == pytest.approx(440, abs=2)
    wave = waves[1][:len(waves[1]) // 320 * 320] + 1e-3
    for percent in (5, 10, 20):
        lost = (common.perturb(wave, f"loss:{percent}", 0).view(-1, 320) == 0).all(1)
        assert int(lost.sum()) == round(len(lost) * percent / 100)
        assert torch.equal(common.perturb(wave, f"loss:{percent}", 0).view(-1, 320)[~lost], wave.view(-1, 320)[~lost])


def test_disfluency_inserts_and_keeps_every_sample(waves):
    wave, kinds = waves[1] + 1e-4 * torch.arange(len(waves[1])) / len(waves[1]), set()
    for seed in range(6):
        out = common.disfluency(wave, 2, torch.Generator().manual_seed(seed), ())
        assert 0.6 <= (len(out) - len(wave)) / common.RATE <= 1.4
        samples = iter(out.tolist())
        assert all(any(sample == kept for sample in samples) for kept in wave.tolist())   # a subsequence, in order
        silent = torch.nn.functional.max_pool1d(out.abs()[None], 4000, 1)[0].amin() == 0  # a quarter of a second
        kinds.add(bool(silent))
    assert kinds == {True, False}
    [clean, held] = common.listen(common.load_whisper("whisper-tiny.en"), [waves[0], common.perturb(waves[0], "disfluency:1", 1)])
    assert "France" in clean["text"] and "France" in held["text"]


@pytest.mark.parametrize("suffix, rate, channels", [("wav", 8000, 1), ("wav", 44100, 2), ("flac", 48000, 2), ("ogg", 16000, 1), ("mp3", 22050, 1)])
def test_audio_of_any_kind_is_read(tmp_path, suffix, rate, channels):
    t = np.arange(rate) / rate
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([0.3 * np.sin(2 * np.pi * 440 * t)] * channels, 1), rate)
    wave = common.read_audio(path)
    assert len(wave) == pytest.approx(common.RATE, rel=0.06)
    assert int(torch.fft.rfft(wave).abs().argmax()) * common.RATE / len(wave) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("wave, words", [
    (np.zeros(0), "silent"), (np.zeros(16000), "silent"), (np.full(16000, 0.5), "silent"), (np.full(800, 0.1), "silent"),
    (np.array([np.nan] * 16000), "NaN"), (np.random.default_rng(0).normal(0, .1, 16000 * 31), "long")])
def test_audio_that_is_no_speech_is_refused(tmp_path, wave, words):
    soundfile.write(tmp_path / "bad.wav", wave, 16000, "FLOAT")
    with pytest.raises(common.UserError, match=words):
        common.read_audio(tmp_path / "bad.wav")


def test_files_that_are_no_audio_are_refused(tmp_path):
    for name, content in (("empty.wav", b""), ("text.wav", b"hello"), ("cut.wav", struct.pack("<4sI4s", b"RIFF", 9, b"WAVE"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(common.UserError, match=name):
            common.read_audio(tmp_path / name)
    with pytest.raises(common.UserError, match="gone.wav"):
        common.read_audio(tmp_path / "gone.wav")


# ------------------------------------------------------------------------------------------------------ the sampler
def embeds(model, ids):
    return model.llm.get_input_embeddings()(torch.tensor(ids))


@pytest.fixture(scope="module")
def chats(model):
    return [sum((common.chat_parts(model.tokenizer)[0], model.tokenizer(text).input_ids,
                 common.chat_parts(model.tokenizer)[1]), []) for text in SENTENCES]


def test_chat_parts_are_the_chat_template(model):
    before, after, end = common.chat_parts(model.tokenizer, "Be kind.")
    whole = model.tokenizer.apply_chat_template([{"role": "system", "content": common.SYSTEM},
                                                 {"role": "user", "content": "hello\nBe kind."}], add_generation_prompt=True,
                                                tokenize=True, return_dict=True)["input_ids"]
    assert model.tokenizer.decode(before + model.tokenizer("hello").input_ids + after) == model.tokenizer.decode(whole)
    assert model.tokenizer.decode([end]) == "<|im_end|>"


def test_greedy_sampling_is_transformers_generate(model, chats):
    got = common.sample(model.llm, [embeds(model, ids) for ids in chats], model.end_id, 24)
    for ids, [(answer, ended)] in zip(chats, got):
        wanted = generated(model, ids, 24)
        assert answer == [t for t in wanted if t != model.end_id] and ended == (model.end_id in wanted)


@pytest.mark.parametrize("temperature", (1.0, 0.5))
def test_samples_follow_the_models_distribution(model, chats, temperature):
    n = 400
    [replies] = common.sample(model.llm, [embeds(model, chats[0])], model.end_id, 1, [list(range(n))], temperature)
    with torch.inference_mode():
        p = (model.llm(torch.tensor([chats[0]])).logits[0, -1] / temperature).softmax(-1)
    drawn = [ids[0] if ids else model.end_id for ids, _ in replies]
    top = p.topk(4).indices.tolist()
    observed = np.array([sum(d == t for d in drawn) for t in top] + [sum(d not in top for d in drawn)])
    expected = n * np.array([*p[top].tolist(), 1 - float(p[top].sum())])
    assert ((observed - expected) ** 2 / expected.clip(1)).sum() < 18.5                    # chi-square, 4 d.f., p = 0.001


def test_a_sample_does_not_depend_on_its_batch_but_for_rounding(model, chats):
    prompts = [embeds(model, ids) for ids in chats]
    seeds = [[10 * i + j for j in range(3)] for i in range(4)]

    def flat(found):
        return [tuple(ids) for replies in found for ids, _ in replies]
    together = flat(common.sample(model.llm, prompts, model.end_id, 12, seeds))
    assert flat(common.sample(model.llm, prompts, model.end_id, 12, seeds)) == together and len(set(together)) == 12
    alone = flat([common.sample(model.llm, [p], model.end_id, 12, [own])[0] for p, own in zip(prompts, seeds)])
    backwards = flat(common.sample(model.llm, prompts[::-1], model.end_id, 12, seeds[::-1])[::-1])
    for other in (alone, backwards):                      # 49k classes: a cdf's tail parts by the last float32 digit
        assert sum(a == b for a, b in zip(together, other)) >= 10


# ----------------------------------------------------------------------------------------------------- the SpeechLM
def test_answers_are_the_same_alone_padded_and_permuted(model, sounds):
    def answers(order):
        items = [dict(prompt=REQUESTS[i]) for i in order]
        return dict(zip(order, stage("04_evaluate").answer_all(model, "init", items, [sounds[i] for i in order], 16, batch_size=3)))
    with torch.no_grad():
        together = answers([0, 1, 2, 3])
        assert together == answers([2, 0, 3, 1])
        for i in range(4):
            assert answers([i])[i] == together[i]
    assert len({text for text, _, _ in together.values()}) > 1


def move(model, size=0.02):
    """W and LoRA away from where they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=generator))


def generated(model, ids, max_new):
    """transformers' own greedy continuation."""
    with torch.inference_mode():
        return model.llm.generate(torch.tensor([ids]), max_new_tokens=max_new, do_sample=False, eos_token_id=model.end_id,
                                  attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0, len(ids):].tolist()


@contextlib.contextmanager
def restored(model):
    """What is trained goes back to where it was."""
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    try:
        yield
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, p in model.trainable().items():
                p.copy_(before[name])


def test_k_answers_behind_one_prompt_are_k_sequences(model, sounds):
    """Packed log-probabilities and gradients against each (prompt, answer) through the whole model and plain log-softmax; the
    audio, request and answer of one item stay together."""
    texts = ["It is Paris.", "No.", "First, heat the oven.", "I can't say that.", "Je vais au magasin.", "Oui.", "Neil Armstrong.", "A man.",
             "", "Use salt and a hot oven for it.", "The store.", "Walk."]
    answers, factor = [model.answer_ids(text) for text in texts], [float(i % 5 - 1.7) for i in range(12)]
    with restored(model):
        move(model)
        prompts = model.speech_prompts(sounds, REQUESTS)
        packed = common.token_log_probs(model.llm, *common.answer_states(model.llm, prompts, answers), 0.7).split([len(y) for y in answers])
        sum(f * lp.sum() for f, lp in zip(factor, packed)).backward()
        got = {name: p.grad.clone() for name, p in model.trainable().items()}
        model.zero_grad()
        for i, (y, f) in enumerate(zip(answers, factor)):
            [prompt] = model.speech_prompts([sounds[i // 3]], [REQUESTS[i // 3]])
            logits = model.llm(inputs_embeds=torch.cat([prompt, embeds(model, y)])[None]).logits[0, len(prompt) - 1:-1]
            alone = (logits / 0.7).log_softmax(-1)[range(len(y)), y]                        # at temperature 0.7
            torch.testing.assert_close(packed[i], alone, rtol=1e-4, atol=1e-4)
            (f * alone.sum()).backward()
        for name, p in model.trainable().items():
            assert (got[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_sampling_merges_lora_and_leaves_the_weights_as_they_were(model, chats):
    with restored(model):
        move(model, 0.05)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        got = common.sample(model.llm, [embeds(model, ids) for ids in chats], model.end_id, 12)
        for ids, [(answer, ended)] in zip(chats, got):
            assert answer + [model.end_id] * ended == generated(model, ids, 12)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert not any("forward" in vars(layer) for layer in model.modules())


def test_sampled_sequences_follow_the_distribution_of_a_small_vocabulary():
    """Every sequence of up to three tokens of a vocabulary of five, enumerated; random weights, grouped heads, two prompts of
    unequal length, rows that end and leave."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(3)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=5, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                       num_key_value_heads=2, initializer_range=0.4)).eval()
    prompts, end, n = [[1, 2, 3, 0, 2], [3]], 4, 3000
    embed = llm.get_input_embeddings()
    with torch.no_grad():
        found = common.sample(llm, [embed(torch.tensor(ids)) for ids in prompts], end, 3, [range(n), range(n, 2 * n)])
        for ids, replies in zip(prompts, found):
            observed, expected = Counter((*answer, *[end] * ended) for answer, ended in replies), {}

            def enumerate_from(prefix, probability):
                if len(prefix) == 3 or prefix[-1:] == (end,):
                    expected[prefix] = n * float(probability)
                    return
                for token, p in enumerate(llm(torch.tensor([[*ids, *prefix]])).logits[0, -1].softmax(-1)):
                    enumerate_from((*prefix, token), probability * p)
            enumerate_from((), 1.0)
            assert sum(expected.values()) == pytest.approx(n, rel=1e-3) and observed.keys() <= expected.keys()
            likely = [key for key, value in expected.items() if value >= 5]
            pairs = [(observed[key], expected[key]) for key in likely]
            pairs.append((n - sum(o for o, _ in pairs), n - sum(e for _, e in pairs)))
            square = sum((o - e) ** 2 / max(e, 1) for o, e in pairs)
            assert len(likely) > 10 and square < len(likely) + 3.1 * math.sqrt(2 * len(likely))   # chi-square, p about 0.001


def test_log_probabilities_are_the_models_own_loss(model):
    prompts = common.text_prompts(model.tokenizer, model.llm, SENTENCES, REQUESTS)
    answers = [model.answer_ids(text) for text in ("Paris.", "Use salt and a hot oven for it.", "Oui.", "Neil.")]
    with torch.no_grad():
        got = common.token_log_probs(model.llm, *common.answer_states(model.llm, prompts, answers)).split([len(y) for y in answers])
        for prompt, y, lp in zip(prompts, answers, got):
            inputs = torch.cat([prompt, embeds(model, y)])[None]
            loss = model.llm(inputs_embeds=inputs, labels=torch.tensor([[-100] * len(prompt) + y])).loss
            assert float(-lp.mean()) == pytest.approx(float(loss), rel=1e-4)


def test_an_llm_is_used_only_where_its_parts_compute_what_it_computes(model, tmp_path):
    """Tiny random ones of real classes: those that scale or cap logits behind the head, and those of other parts, are named; logits by
    the model itself."""
    from transformers import AutoConfig, AutoModelForCausalLM
    size = dict(vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    cases = dict(llama=None, qwen2=None, qwen3=None, phi3=None, olmo2=None, granite="differ from its own", cohere="differ from its own",
                 gemma2="differ from its own", gpt2="linear")
    for kind, said in cases.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **size, **dict(granite=dict(logits_scaling=8.0), gemma2=dict(final_logit_softcapping=0.1)).get(kind, {}))
        config.pad_token_id = config.eos_token_id = config.bos_token_id = None
        llm = AutoModelForCausalLM.from_config(config).eval()
        error = common.own_error(model.tokenizer, llm)
        assert error is None if said is None else said in str(error), (kind, error)
    llm.save_pretrained(tmp_path)                         # GPT-2
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="this kind of LLM .gpt2. can't be used here .it has no linear layers"):
        common.load_llm(str(tmp_path))


def test_ids_that_the_teacher_has_not_are_scored(model):
    """Published students have more rows than tokens: what has no row in the teacher counts as its last."""
    import transformers
    torch.manual_seed(0)
    teacher = common.Teacher.__new__(common.Teacher)
    teacher.model, teacher.llm = model, transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=49140, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)).eval()
    items = [dict(text="Who is it?", prompt="")]
    found, wanted = (common.token_log_probs(*teacher.answer_states(items, [y])) for y in ([5, 49150, 2], [5, 49139, 2]))
    assert found.isfinite().all() and torch.equal(found, wanted)


def test_a_template_that_cant_be_split_is_one_line(model):
    tokenizer = copy.deepcopy(model.tokenizer)
    for template in ("{{ raise_exception('System role not supported') }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0].content }}"):
        tokenizer.chat_template = template
        with pytest.raises(common.UserError, match="its chat template can't be used"):
            common.chat_parts(tokenizer)


def test_text_llm_is_the_base_model_whatever_the_adapter(model):
    base, [chat] = common.load_llm("smollm2-135m", torch.float32)[1], [common.chat_parts(model.tokenizer)[0]]
    weights = [p for n, p in model.trainable().items() if "lora_B" in n]
    with torch.no_grad():
        wanted = base(torch.tensor([chat])).logits
        for p in weights:
            p.add_(0.05)
        changed = model.llm(torch.tensor([chat])).logits
        with model.as_text_llm() as llm:
            got = llm(torch.tensor([chat])).logits
        for p in weights:
            p.sub_(0.05)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert (changed - wanted).abs().max() > 0.1


def test_gradients_reach_bridge_and_lora_and_nothing_else(model, sounds):
    items = [dict(response="It is Paris.", prompt="", text=SENTENCES[0])]
    stage("02_sft_warmup").sft_loss(model, items, sounds[:1]).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    model.zero_grad()
    assert any(n.startswith("bridge.") for n in with_gradient) and any("lora_B" in n for n in with_gradient)
    assert with_gradient <= model.trainable().keys()


def test_reference_policy_stays_while_the_policy_moves(model, sounds):
    model.freeze_reference()
    answer = [model.answer_ids("It is Paris.")]

    def log_probs():
        prompts = model.speech_prompts(sounds[:1], [""])
        return common.token_log_probs(model.llm, *common.answer_states(model.llm, prompts, answer))
    with torch.no_grad(), restored(model):
        start = log_probs()
        move(model)
        moved = log_probs()
        with model.as_reference():
            reference = log_probs()
    torch.testing.assert_close(reference, start, rtol=1e-4, atol=1e-4)
    assert (moved - start).abs().max() > 0.05
    assert all(p.requires_grad for p in model.trainable().values())


def test_one_sft_step_lowers_the_loss_and_kd_of_the_teacher_itself_is_zero(model, sounds):
    sft = stage("02_sft_warmup")
    items = [dict(response="It is Paris.", prompt="", text=SENTENCES[0]), dict(response="Use salt.", prompt="", text=SENTENCES[1])]
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    optimizer, losses = common.make_optimizer(model), []
    for _ in range(3):
        loss = sft.sft_loss(model, items, sounds[:2]) / 10
        loss.backward()
        common.optimizer_step(optimizer, 1e-3, float(loss.detach()))
        losses.append(float(loss.detach()))
    with torch.no_grad():
        for name, p in model.trainable().items():
            p.copy_(before[name])
    assert losses[2] < losses[0]

    class Twin(common.Teacher):                           # the student's own answer states as the teacher's
        def answer_states(self, items, answers):
            prompts = model.speech_prompts(sounds[:2], [item["prompt"] for item in items])
            return model.llm, *common.answer_states(model.llm, prompts, answers)
    with torch.no_grad():
        assert float(sft.kd_loss(model, Twin(model, "smollm2-135m"), items, sounds[:2])) == pytest.approx(0, abs=1e-3)
        teacher = common.Teacher(model, "smollm2-135m")   # untrained, and heard without error: the student reads what it reads
        assert float(sft.kd_loss(model, teacher, items, sounds[:2])) == pytest.approx(0, abs=1e-3)
        assert float(sft.kd_loss(model, teacher, items, sounds[2:])) > 0.01                # other speech than the text's


# ------------------------------------------------------------------------------------------------- checkpoints, cache
def test_checkpoints_round_trip_and_foreign_files_are_refused(model, tmp_path):
    model.save(tmp_path / "a.pt", metrics={"valid_nll": np.float64(1.5)}, data="abc")
    held = torch.load(tmp_path / "a.pt", weights_only=True)
    assert held["metrics"] == {"valid_nll": 1.5} and held["config"]["student"] == "smollm2-135m"
    assert model.load(tmp_path / "a.pt")["data"] == "abc"

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"format": "rba-speechlm-1", "bomb": Bomb()}, tmp_path / "bomb2.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(held | {"config": held["config"] | {"lora_r": 4}}, tmp_path / "smaller.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    for name in ("bomb", "bomb2", "other", "smaller", "cut", "missing"):
        with pytest.raises(common.UserError, match=name):
            model.load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "executed").exists()


def test_a_wheel_with_another_checksum_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("RBA_CACHE", str(tmp_path / "cache"))

    def fake_download(command, **_):                      # a stub: the failure must be forced
        with zipfile.ZipFile(f"{command[command.index('-d') + 1]}/toy-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy/data.bin", b"replaced")
        return type("Done", (), {"returncode": 0, "stderr": ""})()
    monkeypatch.setattr(common.subprocess, "run", fake_download)
    monkeypatch.setitem(common.EMBEDDED, "toy", (1, ["toy==1"], {"data.bin": (["toy/data.bin"], "0" * 64)}))
    with pytest.raises(common.UserError, match="sha256"):
        common.resolve("toy")
    assert os.listdir(tmp_path / "cache") == ["toy.lock"]
    import hashlib
    good = hashlib.sha256(b"replaced").hexdigest()
    monkeypatch.setitem(common.EMBEDDED, "toy", (1, ["toy==1"], {"data.bin": (["toy/data.bin"], good)}))
    (tmp_path / "cache" / "toy").mkdir()                  # half-filled by a kill: fetched again
    (tmp_path / "cache" / "toy" / "data.bin").write_bytes(b"half")
    assert open(common.resolve("toy") + "/data.bin", "rb").read() == b"replaced"


def test_embeddings_tell_likeness(model):
    a, b, c = common.Embedder("minilm-l6")(["How do I bake bread?", "Tell me how bread is baked.", "The stock market fell."])
    assert float(a @ a) == pytest.approx(1, abs=1e-5) and float(a @ b) > 0.7 > 0.3 > float(a @ c)
    encode = stage("04_evaluate").WordLlama()             # the reference: the wordllama package's own `similarity`
    a, b, c, empty = encode(["The capital of France is Paris.", "Paris is France's capital city.", "A fox ran over the hill.", ""])
    assert [float(a @ other) for other in (a, b, c, empty)] == pytest.approx([1, 0.96023, -0.02231, 0], abs=2e-4)


@pytest.mark.gpu
def test_the_speechlm_on_a_gpu_hears_what_the_cpu_hears(model, waves):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    other = common.SpeechLM(common.PRESETS["tiny"], "cuda", torch.float32)
    [on_gpu], [on_cpu] = (m.listen(waves[:1], 12.0) for m in (other, model))
    assert on_gpu["ids"] == on_cpu["ids"]
    with torch.no_grad():
        torch.testing.assert_close(other.hear([on_gpu])[0].cpu(), model.hear([on_cpu])[0], rtol=1e-2, atol=1e-2)
