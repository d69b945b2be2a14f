"""What is met at paper scale: published SpeechLMs and VITS through the classes that transformers has for them (the real class and
processor, tiny and random), reward models, teachers with other tokens, teachers behind a URL."""
import json
import shutil
import sys

import pytest
import torch
import transformers
from conftest import SENTENCES, stage
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

import common

AUDIO = dict(num_mel_bins=128, d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64)
TEXT = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ITEMS = [dict(id=str(i), task="instruct", text=text, prompt=prompt, response=answer, reference=[answer]) for i, (text, prompt, answer) in enumerate(
    zip(SENTENCES, ("", "Answer in one short sentence.", "", ""), ("Paris.", "Roast it slowly until it is done.", "Have fun!", "Neil Armstrong.")))]


def qwen2_audio(vocabulary, audio_id):
    config = transformers.Qwen2AudioConfig(audio_config=AUDIO | dict(model_type="qwen2_audio_encoder"), audio_token_index=audio_id,
                                           text_config=TEXT | dict(model_type="qwen2", vocab_size=vocabulary))
    return transformers.Qwen2AudioForConditionalGeneration(config)


def qwen2_5_omni(vocabulary, audio_id):
    """As it is published: the thinker is a part of the checkpoint, whose other parts are not loaded."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 2, 2])
    thinker = dict(audio_config=AUDIO | dict(output_dim=48), text_config=TEXT | dict(vocab_size=vocabulary, rope_parameters=rope),
                   vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48), audio_token_index=audio_id,
                   audio_start_token_id=audio_id + 1, audio_end_token_id=audio_id + 2, image_token_index=audio_id + 3, video_token_index=audio_id + 4,
                   vision_start_token_id=audio_id + 5, vision_end_token_id=audio_id + 6)
    return omni.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False))


OMNI_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module", params=[qwen2_audio, qwen2_5_omni], ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    """A directory as `save_pretrained` writes it: random weights, SmolLM2's words and the model's own special tokens."""
    path = tmp_path_factory.mktemp(request.param.__name__)
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.resolve("smollm2-135m"))
    features = transformers.WhisperFeatureExtractor(feature_size=128)
    special = dict(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    if request.param is qwen2_5_omni:
        special |= {f"{name}_token": f"<|{name.upper()}|>" for name in ("image", "video", "vision_bos", "vision_eos")}
    tokenizer.add_special_tokens({"additional_special_tokens": [*special.values()]})
    for name, token in special.items():
        tokenizer.init_kwargs[name] = token
        setattr(tokenizer, name, token)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = None                        # the processor has it
    if request.param is qwen2_audio:
        processor = transformers.Qwen2AudioProcessor(features, tokenizer)
    else:
        processor = transformers.Qwen2_5OmniProcessor(transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor(), features, tokenizer,
                                                      chat_template=OMNI_TEMPLATE)
    torch.manual_seed(0)
    model = request.param(len(tokenizer), tokenizer.convert_tokens_to_ids("<|AUDIO|>"))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def speechlm(folder):
    torch.manual_seed(1)
    model = common.load_speechlm(common.PRESETS["tiny"] | dict(student=str(folder)), dtype=torch.float32)
    assert isinstance(model, common.PublishedSpeechLM)
    for parameter in model.trainable().values():          # LoRA as after some training
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def heard(speechlm, waves):
    return speechlm.listen(waves)


def own_inputs(model, wave, prompt, answer):
    """What a user of transformers would write."""
    content = [dict(type="audio", audio_url="x.wav")] + ([dict(type="text", text=prompt)] if prompt else [])
    text = model.processor.apply_chat_template([dict(role="system", content=common.SYSTEM), dict(role="user", content=content)], tokenize=False,
                                               add_generation_prompt=True)
    inputs = model.processor(text=text + answer + "<|im_end|>", audio=[wave.numpy()], sampling_rate=common.RATE, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :-len(model.answer_ids(answer))] = -100
    return inputs, labels


def test_log_probabilities_are_those_of_the_models_own_loss(speechlm, heard, waves):
    with torch.no_grad():
        prompts = speechlm.speech_prompts(heard, [item["prompt"] for item in ITEMS])
        answers = [speechlm.answer_ids(item["response"]) for item in ITEMS]
        flat = common.token_log_probs(speechlm.llm, *common.answer_states(speechlm.llm, prompts, answers))
        for wave, item, part in zip(waves, ITEMS, flat.split([len(y) for y in answers])):
            inputs, labels = own_inputs(speechlm, wave, item["prompt"], item["response"])
            loss = speechlm.llm(**inputs, labels=labels).loss
            torch.testing.assert_close(-part.mean(), loss, rtol=1e-4, atol=1e-4)


def test_a_batch_is_each_wave_alone_in_any_order(speechlm, heard, waves):
    """Unequal lengths; padding, neighbours and order change nothing."""
    assert len({len(row["ids"]) for row in heard}) > 1 and all(len(row["ids"]) == len(row["states"]) > 10 for row in heard)
    permuted, alone = speechlm.listen(waves[::-1])[::-1], [speechlm.listen([wave])[0] for wave in waves]
    for row, *others in zip(heard, permuted, alone):
        for other in others:
            assert other["text"] == row["text"]
            torch.testing.assert_close(other["states"], row["states"], rtol=1e-4, atol=1e-4)


def test_greedy_answers_are_the_models_own(speechlm, heard, waves):
    prompts = speechlm.speech_prompts(heard, [item["prompt"] for item in ITEMS])
    answers = common.sample(speechlm.llm, prompts, speechlm.end_id, 8)
    for wave, item, [(ids, _)] in zip(waves, ITEMS, answers):
        inputs, _ = own_inputs(speechlm, wave, item["prompt"], "")
        inputs = {name: value[:, :-1] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()}
        with torch.no_grad():
            own = speechlm.llm.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=speechlm.end_id, pad_token_id=0)
        assert ids == own[0, inputs["input_ids"].shape[1]:].tolist()[:len(ids)] and len(ids) == 8


def test_k_answers_share_one_prompt(speechlm, heard):
    """Packed log-probabilities and gradients of K answers are those of K copies of the prompt, and recomputed layers change neither."""
    answers = [[speechlm.answer_ids(item["response"]) for item in ITEMS[i:] + ITEMS[:i]] for i in range(2)]
    results = []
    recomputing = common.load_speechlm(common.PRESETS["tiny"] | dict(student=speechlm.config["student"], checkpointing=True), dtype=torch.float32)
    recomputing.load_state_dict(speechlm.state_dict())
    for model, packed in ((speechlm, True), (speechlm, False), (recomputing, True)):
        prompts = model.speech_prompts(heard[:2], ["", "Be brief."])
        own = (prompts, sum(answers, [])) if packed else ([p for p in prompts for _ in range(4)], sum(answers, []))
        log_probs = common.token_log_probs(model.llm, *common.answer_states(model.llm, *own))
        log_probs.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.trainable().items()}
        model.zero_grad()
        results.append((log_probs.detach(), gradients))
    for log_probs, gradients in results[1:]:
        torch.testing.assert_close(log_probs, results[0][0], rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-4)


def test_only_lora_in_the_llm_is_trained_saved_and_loaded(speechlm, heard, tmp_path):
    assert all("lora_" in name and "audio_tower" not in name and "visual" not in name for name in speechlm.trainable())
    speechlm.save(tmp_path / "a.pt")
    other = common.load_speechlm(speechlm.config, dtype=torch.float32)
    with torch.no_grad():
        before, after = [], []
        for found in (before, after):
            prompts = other.speech_prompts(heard, [""] * 4)
            found.append(common.token_log_probs(other.llm, *common.answer_states(other.llm, prompts, [[5, 6]] * 4)))
            other.load(tmp_path / "a.pt")
        prompts = speechlm.speech_prompts(heard, [""] * 4)
        expected = common.token_log_probs(speechlm.llm, *common.answer_states(speechlm.llm, prompts, [[5, 6]] * 4))
    assert not torch.allclose(before[0], expected, atol=1e-3)
    torch.testing.assert_close(after[0], expected)
    other.freeze_reference()
    with other.as_reference():
        prompts = other.speech_prompts(heard, [""] * 4)
        torch.testing.assert_close(common.token_log_probs(other.llm, *common.answer_states(other.llm, prompts, [[5, 6]] * 4)).detach(), expected)


# ------------------------------------------------------------------------------------------------------ the four stages
@pytest.fixture
def run(monkeypatch, work, tmp_path):
    """A stage in this process, on the data of the suite's end-to-end run -> what it printed."""
    shutil.copytree(work / "data", tmp_path / "data")
    monkeypatch.setattr(common, "native_dtype", lambda: torch.float32)

    def go(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--work", str(tmp_path), *map(str, flags)])
        stage(script).main()
        return tmp_path
    return go


@pytest.mark.slow
@pytest.mark.parametrize("folder", [qwen2_audio], indirect=True, ids=["qwen2_audio"])   # the tests above try what the stages call of both
def test_a_published_student_goes_through_all_stages(folder, run, capsys):
    """Its tokenizer is the teacher's with special tokens of its own: kd and opd can be computed."""
    student = "--student", folder
    run("02_sft_warmup", *student, "--objective", "sft", "--max-steps", 1, "--batch-size", 2)
    run("02_sft_warmup", *student, "--objective", "kd", "--max-steps", 1, "--batch-size", 2)
    run("03_rba_rl", *student, "--max-steps", 1, "--batch-size", 2, "--k", 2, "--token-reward", 0.1)
    path = run("04_evaluate", *student, "--systems", "cascade,kd,rba+opd", "--conditions", "noise:5")
    rows = json.loads((path / "results.json").read_text())["rows"]
    assert {row["system"] for row in rows} == {"cascade", "kd", "rba+opd"} and {"accuracy", "log π_T"} <= {r["metric"] for r in rows}
    history = common.load_checkpoint(path / "rba+opd.pt", "rba-speechlm-1")["history"]
    assert [entry["objective"] for entry in history] == ["sft", "rl"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A tiny random teacher whose tokens are other ones."""
    path = tmp_path_factory.mktemp("foreign")
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.resolve("smollm2-135m"))
    own = tokenizer.train_new_from_iterator(["a text of some words to learn a few tokens from"] * 9, 300)
    own.chat_template = tokenizer.chat_template
    torch.manual_seed(2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(own), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                           num_attention_heads=2)).save_pretrained(path)
    own.save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_teacher_with_other_tokens(foreign, run, work, model, tmp_path, capsys):
    """What it wrote is learned from and rewarded; what needs its token log-probabilities says so in one line, or is left out."""
    with pytest.raises(common.UserError, match="different token ids"):
        common.Teacher(model, str(foreign))
    shutil.copy(work / "sft.pt", tmp_path)
    config = json.loads((work / "data" / "config.json").read_text())
    config["config"]["teacher"] = str(foreign)
    (tmp_path / "data" / "config.json").write_text(json.dumps(config))
    path = run("03_rba_rl", "--teacher", foreign, "--max-steps", 1, "--batch-size", 2)         # rba, and opd left out
    assert (path / "rba.pt").exists() and not (path / "opd.pt").exists()
    run("04_evaluate", "--teacher", foreign, "--conditions", "clean", "--systems", "sft,rba")
    metrics = {row["metric"] for row in json.loads((path / "results.json").read_text())["rows"]}
    assert "chrF" in metrics and not {"log π_T", "wins"} & metrics
    assert "opd is left out" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="were made with --teacher"):
        run("04_evaluate", "--conditions", "clean")


# ------------------------------------------------------------------------------------------------------ reward models
def test_rewards_are_the_reward_models_own_in_a_batch(tmp_path):
    """Its own chat template around the gold words; padding changes nothing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.resolve("smollm2-135m"))
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                      num_labels=1, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewards = common.RewardModel(str(tmp_path), "cpu")
    answers = ["Paris.", "Roast it slowly until it is done, then let it rest for a while.", "", "Neil"]
    for item, answer, reward in zip(ITEMS, answers, rewards(ITEMS, answers)):
        said = item["text"] + ("\n" + item["prompt"] if item["prompt"] else "")
        ids = tokenizer.apply_chat_template([dict(role="user", content=said), dict(role="assistant", content=answer)], return_tensors="pt")
        with torch.no_grad():
            assert reward == pytest.approx(float(rewards.model(ids["input_ids"] if not torch.is_tensor(ids) else ids).logits), rel=2e-2, abs=2e-3)


# ------------------------------------------------------------------------------------------------------ VITS
@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    path = tmp_path_factory.mktemp("vits")
    symbols = ["_", *" abdefghijklmnoprstuvwxzæðŋɐɑɒɔəɚɛɜɡɪɹʃʊʌʒˈˌːθᵻɾ"]
    (path / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    transformers.VitsTokenizer(str(path / "vocab.json"), pad_token="_", unk_token="_", language="en-us", phonemize=True).save_pretrained(path)
    torch.manual_seed(4)
    config = transformers.VitsConfig(vocab_size=len(symbols), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
                                     spectrogram_bins=9, prior_encoder_num_flows=1, num_speakers=3, speaker_embedding_size=8,
                                     upsample_initial_channel=16, upsample_rates=[8, 8, 2, 2], sampling_rate=16000,
                                     wavenet_dilation_rate=1, prior_encoder_num_wavenet_layers=1, duration_predictor_filter_channels=16)
    transformers.VitsModel(config).save_pretrained(path)
    return path


def test_a_vits_speaks_a_batch_as_each_alone(vits):
    """Unequal lengths, speakers and speeds; silent noise, so that it is the same every time."""
    voices = stage("01_synthesize").Voices(f"{vits}#0-2")
    assert [*voices.weights] == [f"{vits}#{i}" for i in range(3)]
    requests = [(f"{vits}#{i % 3}", text, speed) for i, (text, speed) in enumerate(zip(SENTENCES, (1.0, 1.5, 0.8, 1.0)))]
    together = voices.say_all(requests)
    for request, (wave, rate) in zip(requests, together):
        [(alone, _)] = voices.say_all([request])
        assert rate == 16000 and len(wave) == len(alone) > 1000
        assert abs(wave[:-2000] - alone[:-2000]).max() < 1e-3
    [(slow, _), (other, _)] = voices.say_all([(f"{vits}#0", SENTENCES[1], 0.5), (f"{vits}#1", SENTENCES[1], 1.5)])
    assert len(slow) > 2 * len(together[1][0]) and len(other) == len(together[1][0]) and abs(other - together[1][0]).max() == 0
    [(another, _)] = voices.say_all([(f"{vits}#2", SENTENCES[1], 1.5)])
    assert len(another) != len(other) or abs(another - other).max() > 1e-3                     # a speaker of its own
    with pytest.raises(common.UserError, match="speakers #0 to #2"):
        voices.say_all([(f"{vits}#3", "Hello", 1.0)])


# ------------------------------------------------------------------------------------------------------ served teachers
@pytest.mark.slow
def test_a_served_teacher_writes_what_a_local_one_writes(server):
    """Greedily token by token; samples end, are of the user's turn, and follow the temperature."""
    synthesize, (url, name) = stage("01_synthesize"), server
    served, local = synthesize.ServedTeacher(f"{url}#{name}"), synthesize.LocalTeacher("smollm2-135m", "cpu")
    tokenizer = local.tokenizer
    assert served.dialect == "transformers"
    before, after, end_id = common.chat_parts(tokenizer)
    prompts = [before + tokenizer(text).input_ids + after for text in SENTENCES[:2]]
    own = local.continuations(prompts, end_id, 24, None, 1.0)
    found = served.continuations(prompts, end_id, 24, None, 1.0)
    assert [[ended for _, ended in replies] for replies in found] == [[ended for _, ended in replies] for replies in own]
    for [(said, _)], [(expected, _)] in zip(found, own):  # bfloat16 rounding may part two greedy paths, late
        assert common.token_f1(said, expected) > 0.8
    prefix = common.chat_parts(tokenizer, system=None)[0]
    [samples] = served.continuations([prefix], end_id, 32, [[1, 2, 3, 4, 5, 6]], 1.0)
    assert len({text for text, _ in samples}) == 6 and any(ended for _, ended in samples)
    args = common.parse_args("", synthesize.FLAGS, [])
    synthesize.BATCH, before = 16, synthesize.BATCH
    try:
        rows = synthesize.write_texts(served, "instruct", 0, args)
    finally:
        synthesize.BATCH = before
    kept = [row for row in rows if not row["dropped"]]
    assert len(rows) == 16 and kept and all(row["ended"] and row["response"] for row in kept)


def test_a_url_that_is_no_teacher_is_one_line(monkeypatch, tmp_path):
    for url, problem in (("http://127.0.0.1:9/v1", "add #MODEL"), ("http://127.0.0.1:9/v1#" + common.resolve("smollm2-135m"), "no answer from completions")):
        monkeypatch.setattr(sys, "argv", ["01_synthesize.py", "--work", str(tmp_path / "w"), "--teacher", url])
        with pytest.raises(common.UserError, match=problem):
            stage("01_synthesize").main()
    with pytest.raises(common.UserError, match="can't score tokens"):
        common.load_llm("http://127.0.0.1:9/v1#x")
