"""What is met at paper scale, tiny and random: published SpeechLMs in their real classes, others' teachers.

common.PublishedSpeechLM has layers and attention of its own in its decoder, so what it must equal is a second
copy that transformers loaded itself, with LoRA merged into its weights; float32, to compare digits.
"""
import json
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from conftest import SENTENCES, log_of, run_stage, stage
from test_models import merged
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

import common

AUDIO = dict(num_mel_bins=128, d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64)
TEXT = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3)    # more than usual: a few updates teach it
REQUESTS = ("", "Answer in one short sentence.", "", "")
ANSWERS = ("Paris.", "Roast it slowly until it is done.", "Have fun!", "Neil Armstrong.")


@pytest.fixture(scope="module", autouse=True)
def float32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "native_dtype", lambda: torch.float32)
        yield


# ------------------------------------------------------------------- what `save_pretrained` would write
def qwen2_audio(vocabulary, audio_id):
    text = TEXT | dict(vocab_size=vocabulary)
    config = transformers.Qwen2AudioConfig(audio_config=AUDIO, text_config=text, audio_token_index=audio_id)
    return transformers.Qwen2AudioForConditionalGeneration(config)


def qwen2_5_omni(vocabulary, audio_id):
    """As it is published: the thinker is a part of the checkpoint, whose other parts are not loaded."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 2, 2])
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48)
    tokens = ("audio_token_index", "audio_start_token_id", "audio_end_token_id", "image_token_index",
              "video_token_index", "vision_start_token_id", "vision_end_token_id")
    thinker = dict(zip(tokens, range(audio_id, audio_id + 7)))
    thinker |= dict(audio_config=AUDIO | dict(output_dim=48), vision_config=vision,
                    text_config=TEXT | dict(vocab_size=vocabulary, rope_parameters=rope))
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return omni.Qwen2_5OmniForConditionalGeneration(config)


def processor_of(make):
    """SmolLM2's words and the model's own special tokens."""
    special = dict(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    for name in ("image", "video", "vision_bos", "vision_eos"):
        special[f"{name}_token"] = f"<|{name}|>"
    path = common.resolve("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, extra_special_tokens=special)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = None                        # the processor has it
    features = transformers.WhisperFeatureExtractor(feature_size=128)
    processor = transformers.Qwen2AudioProcessor(features, tokenizer)
    if make is qwen2_audio:
        return processor
    images, videos = transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor()
    return transformers.Qwen2_5OmniProcessor(images, videos, features, tokenizer, processor.chat_template)


@dataclass
class Published:
    """The SpeechLM as this repo loads it, LoRA as after some training; transformers' own with LoRA merged."""
    folder: str
    ours: common.PublishedSpeechLM
    original: torch.nn.Module
    heard: list                                           # what `ours` made of the waves

    def prompts(self, model=None, n=4):
        return (model or self.ours).speech_prompts(self.heard[:n], REQUESTS[:n])

    def inputs(self, wave, request, answer=""):
        """What a user of transformers would write."""
        content = [dict(type="audio", audio_url="x.wav")] + [dict(type="text", text=request)] * bool(request)
        chat = [dict(role="system", content=common.SYSTEM), dict(role="user", content=content)]
        processor = self.ours.processor
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + answer
        return processor(text=text, audio=[wave.numpy()], sampling_rate=common.RATE, return_tensors="pt")

    def generate(self, model, inputs, max_new):
        """Greedy ids by transformers."""
        found = model.generate(**inputs, max_new_tokens=max_new, do_sample=False, pad_token_id=0,
                               eos_token_id=self.ours.end_id)
        return found[0, inputs["input_ids"].shape[1]:].tolist()

    def loss(self, wave, request, answer):
        """The original's own, of the answer and its end."""
        inputs = self.inputs(wave, request, answer + "<|im_end|>")
        labels = inputs["input_ids"].clone()
        labels[:, :-len(self.ours.answer_ids(answer))] = -100
        return self.original(**inputs, labels=labels).loss


@pytest.fixture(scope="module", params=[qwen2_audio, qwen2_5_omni], ids=lambda make: make.__name__)
def published(request, tmp_path_factory, waves):
    folder, processor = str(tmp_path_factory.mktemp(request.param.__name__)), processor_of(request.param)
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    torch.manual_seed(0)
    request.param(len(processor.tokenizer), audio_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    ours = common.load_speechlm(common.PRESETS["tiny"] | dict(student=folder))
    torch.manual_seed(1)
    for parameter in ours.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05)
    plain = type(ours.llm).from_pretrained(folder, dtype=torch.float32).eval()
    return Published(folder, ours, merged(plain, ours.llm), ours.listen(waves, 12.0))


def template(tokenizer, asks=False, **turns):
    """A chat as token ids."""
    chat = [dict(role=role, content=content) for role, content in turns.items()]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=asks, tokenize=False)
    return tokenizer(text, return_tensors="pt")


only_qwen2_audio = pytest.mark.parametrize("published", [qwen2_audio], indirect=True)


# --------------------------------------------------------------------------------------- the SpeechLM
def test_log_probabilities_are_those_of_the_models_own_loss(published, waves):
    with torch.no_grad():
        answers = [[published.ours.answer_ids(answer)] for answer in ANSWERS]
        found = common.token_log_probs(published.ours.llm, published.prompts(), answers)
        for wave, request, answer, lp in zip(waves, REQUESTS, ANSWERS, found):
            loss = published.loss(wave, request, answer)
            torch.testing.assert_close(-lp.mean(), loss, rtol=1e-4, atol=1e-4)


def test_a_batch_is_each_wave_alone_in_any_order(published, waves):
    """Unequal lengths; padding, neighbours and order change nothing."""
    ours, heard = published.ours, published.heard
    assert len({len(row["ids"]) for row in heard}) > 1
    permuted, alone = ours.listen(waves[::-1], 12.0)[::-1], [ours.listen([wave], 12.0)[0] for wave in waves]
    for row, *others in zip(heard, permuted, alone):
        assert len(row["ids"]) == len(row["states"]) > 10
        for other in others:
            assert other["text"] == row["text"]
            torch.testing.assert_close(other["states"], row["states"], rtol=1e-4, atol=1e-4)


def test_typed_words_are_embedded_when_they_are_read(published):
    typed = published.ours.read("Go home.")               # no vectors are kept for a million of them
    assert typed.keys() == {"text", "ids"}
    torch.testing.assert_close(published.ours.hear(typed), common.embed(published.ours.llm, typed["ids"]))


def test_greedy_answers_are_those_of_generate(published, waves):
    answers = published.ours.answer(published.heard, REQUESTS, 8)
    for wave, request, answer in zip(waves, REQUESTS, answers):
        said = answer.ids + [published.ours.end_id] * answer.ended
        assert said == published.generate(published.original, published.inputs(wave, request), 8)
    assert max(len(answer.ids) for answer in answers) > 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_answers_share_one_prompt(published, waves, checkpointing):
    """Values and gradients are those of each through the whole original; also with layers computed twice."""
    config = common.PRESETS["tiny"] | dict(student=published.folder, checkpointing=checkpointing)
    model, calls, layers = common.load_speechlm(config), [], dict(published.original.named_modules())
    model.set_state(published.ours.state())
    model.llm.get_decoder().layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    pairs = [[ANSWERS[i], ANSWERS[i + 2]] for i in range(2)]
    packed = [[model.answer_ids(answer) for answer in pair] for pair in pairs]
    found = common.token_log_probs(model.llm, published.prompts(model, 2), packed)
    torch.cat(found).sum().backward()
    published.original.zero_grad()
    for i, lp in enumerate(found):
        alone = published.loss(waves[i // 2], REQUESTS[i // 2], pairs[i // 2][i % 2])
        torch.testing.assert_close(-lp.mean(), alone, rtol=1e-4, atol=1e-4)
        (-len(lp) * alone).backward()                     # of its sum
    adapted = [name for name, layer in model.llm.named_modules() if getattr(layer, "r", 0)]
    for name in adapted:
        layer, slope = model.llm.get_submodule(name), 2 * layers[name].weight.grad
        torch.testing.assert_close(layer.lora_B.grad, slope @ layer.lora_A.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.T @ slope, rtol=1e-3, atol=1e-4)
    assert len(adapted) == 14 and len(calls) == 1 + checkpointing


def test_only_lora_in_the_llm_is_trained_saved_and_loaded(published, tmp_path):
    ours, decoder = published.ours, {id(p) for p in published.ours.llm.get_decoder().parameters()}
    learning = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert learning == ours.trainable().keys() and len(learning) == 28
    assert all(id(p) in decoder for p in ours.trainable().values())
    held = {"format": common.CHECKPOINT, "config": ours.config, "history": [], "state": ours.state()}
    torch.save(held, tmp_path / "a.pt")
    other, found = common.load_speechlm(common.PRESETS["tiny"] | dict(student=published.folder)), []
    for model, path in ((ours, None), (other, "none"), (other, tmp_path / "a.pt")):
        if path:
            model.load(path)
        found += common.token_log_probs(model.llm, published.prompts(model, 1), [[[5, 6]]])
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1], atol=1e-3)


# ----------------------------------------------------------------------------------------- the stages
@pytest.fixture
def work(groups, tmp_path):
    """A copy of the groups: four instructions, in valid and test two, in two voices each."""
    work = shutil.copytree(groups, tmp_path / "work")
    for path in (work / "data").glob("*.jsonl"):
        rows = [row for row in common.read_jsonl(path) if row["voice"] in ("tempo-0", "tempo-3")]
        common.write_jsonl(path, rows if path.stem == "train" else rows[:4])
    return work


@pytest.fixture
def run(work, monkeypatch):
    """A stage's own main() in this process."""
    monkeypatch.setitem(common.PRESETS, "tiny", common.PRESETS["tiny"] | dict(max_new=16, held_out=2))

    def go(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--work", str(work), *map(str, flags)])
        stage(script).main()
    return go


@only_qwen2_audio
def test_a_published_student_goes_through_all_stages(published, run, work):
    student = "--batch-size", 4, "--student", published.folder
    run("02_sft_warmup", *student, "--objective", "sft", "--max-steps", 20, "--lr", 2e-2)   # answers end then
    run("03_rba_rl", *student, "--max-steps", 2)
    for name in ("rba-group", "rba-single"):
        held = torch.load(work / f"{name}.pt", weights_only=True)
        assert [past["objective"] for past in held["history"]] == ["sft", name]
        assert held["state"].keys() == published.ours.trainable().keys()
        assert log_of(work, name)[-1]["pairs"] > 0 and log_of(work, name)[-1]["grad_norm"] > 0
    run("04_evaluate", *student[2:], "--conditions", "noise:5")
    systems = json.loads((work / "results.json").read_text())["systems"]
    assert systems == ["text", "base", "sft", "rba-single", "rba-group"]

@only_qwen2_audio
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(published, work):
    """At a low temperature: where 49155 tokens are about as likely, rounding would choose another one."""
    found, flags = [], ("--objective", "rba-single", "--init", "none", "--max-steps", 1, "--batch-size", 3)
    for processes in (1, 2):
        path = work / f"gradients-{processes}"
        run_stage("03_rba_rl.py", work, *flags, "--student", published.folder, "--temperature", 0.1, "--out",
                  f"by-{processes}", processes=processes, FLOAT32=1, GRADIENTS=path)
        found.append(torch.load(path, weights_only=True))
    assert torch.stack([gradient.norm() for gradient in found[0]]).sum() > 0
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-3 * one.norm() + 1e-7


# ------------------------------------------------------------------------- other teachers, reward models
def write_llama(path, kind, tokenizer, **options):
    """A tiny random Llama with this tokenizer."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                      num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, **options)
    model = kind(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.fixture
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(common.resolve("smollm2-135m"))


def test_a_teacher_with_other_tokens_teaches_by_its_words_alone(run, work, tokenizer, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    write_llama(student, transformers.LlamaForCausalLM, tokenizer)
    tokenizer.add_tokens(["<|one more|>"])
    write_llama(teacher, transformers.LlamaForCausalLM, tokenizer)
    config = dict(preset="tiny", teacher=str(teacher), served=False, language="French")
    common.write_json(work / "data" / "config.json", {"config": config})
    flags = "--student", student, "--max-steps", 1, "--batch-size", 2
    run("02_sft_warmup", *flags)                          # all that can be computed
    assert {path.name for path in work.glob("*.pt")} == {"sft.pt", "sft+.pt"}
    with pytest.raises(common.UserError, match="different token ids; use --objective sft"):
        run("02_sft_warmup", *flags, "--objective", "kd")


def test_a_base_model_without_a_template_is_one_line(tokenizer, tmp_path):
    tokenizer.chat_template = None
    write_llama(tmp_path, transformers.LlamaForCausalLM, tokenizer)
    with pytest.raises(common.UserError, match=f"^{tmp_path}: its tokenizer has no chat template"):
        common.load_llm(str(tmp_path))


def test_rewards_are_the_reward_models_own(tokenizer, tmp_path):
    """In its own chat template, without a system turn of ours."""
    model = write_llama(tmp_path, transformers.LlamaForSequenceClassification, tokenizer, num_labels=1)
    items, answers, scores = [], [*ANSWERS[:3], ""], []
    for text, request, answer in zip(SENTENCES, REQUESTS, answers):
        items.append(dict(text=text, prompt=request))
        user = f"{text}\n{request}" if request else text
        scores.append(model(**template(tokenizer, user=user, assistant=answer)).logits.item())
    assert common.RewardModel(str(tmp_path))(items, answers) == pytest.approx(scores, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3
    write_llama(tmp_path, transformers.LlamaForCausalLM, tokenizer)        # no trained head
    with pytest.raises(common.UserError, match="no trained head or no chat template"):
        common.RewardModel(str(tmp_path))
