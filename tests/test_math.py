"""Losses, pairs and schedules against independent computations: float64, brute force, enumeration."""
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import stage
from transformers import AutoModelForCausalLM

import common

sft, rba = stage("02_sft_warmup"), stage("03_rba_rl")


# -------------------------------------------------------------------------------------------- preference loss
def test_preference_loss_is_eq_2():
    """Against the formula in plain probabilities: V = pi_theta / pi_ref,
    -log sigma(beta log V+ - beta log V-)."""
    generator = torch.Generator().manual_seed(0)
    lp = -5 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    loss, chosen, rejected = rba.preference_loss(*lp, beta=0.3)
    for i in range(6):
        positive, negative, reference_positive, reference_negative = lp[:, i].exp().tolist()
        v_plus, v_minus = positive / reference_positive, negative / reference_negative
        odds = (v_plus / v_minus) ** 0.3
        assert float(loss[i]) == pytest.approx(-math.log(odds / (1 + odds)))
        assert float(chosen[i]) == pytest.approx(0.3 * math.log(v_plus))
        assert float(rejected[i]) == pytest.approx(0.3 * math.log(v_minus))


def test_at_the_reference_the_loss_is_log_2_and_its_slope_half_beta():
    lp = torch.tensor([-3.0, -4.0], dtype=torch.float64)
    positive, negative = lp[:1].clone().requires_grad_(), lp[1:].clone().requires_grad_()
    loss, _, _ = rba.preference_loss(positive, negative, lp[:1], lp[1:], beta=0.1)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    loss.sum().backward()
    assert float(positive.grad) == pytest.approx(-0.05) and float(negative.grad) == pytest.approx(0.05)


def test_single_with_fresh_samples_is_half_beta_of_sft_at_first():
    """E over y ~ pi_theta of the gradient of L_S at V = 1 is beta / 2 of the gradient of -log
    pi_theta(y_ref): the negative teaches nothing. A softmax over four answers, enumerated."""
    logits, beta, y_ref = torch.tensor([.3, -.2, .5, .1], dtype=torch.float64, requires_grad=True), 0.4, 2
    log_p = logits.log_softmax(0)
    reference, expected = log_p.detach(), 0.0
    for y in range(4):
        loss, _, _ = rba.preference_loss(log_p[[y_ref]], log_p[[y]], reference[[y_ref]], reference[[y]], beta)
        expected = expected + float(reference[y].exp()) * loss.sum()
    got, = torch.autograd.grad(expected, logits, retain_graph=True)
    wanted, = torch.autograd.grad(-beta / 2 * log_p[y_ref], logits)
    torch.testing.assert_close(got, wanted)


def rows_of(answers, rewards, ended=None, response="the reference"):
    ended = ended or [True] * len(answers)
    return [dict(id=f"{answers}-{s}", group="g", round=0, answer=answer, reward=reward, ended=e,
                 response=response, logp_y_ref=-1.0 - s, logp_answer=-2.0 - s)
            for s, (answer, reward, e) in enumerate(zip(answers, rewards, ended))]


@pytest.mark.parametrize("answers, rewards, ended, roles, why", [
    ("abcd", [.1, .9, .3, .2], None, ["negative", "positive", "", ""], "between"),
    ("abcd", [.5, .5, .5, .5], None, [""] * 4, "rewards tie"),
    ("aabc", [.1, .1, .1, .9], None, ["negative", "", "", "positive"], "between"),
    ("abcd", [.1, .9, .3, .2], [True, False, True, True], ["negative", "", "positive", ""], "between"),
    ("abcd", [.1, .9, .3, .2], [False] * 4, [""] * 4, "no answer ended"),
    ("abcd", [.4, .1, .9, .5], [False, True, False, False], [""] * 4, "only the worst ended"),
    ("abcd", [.1, .9, .3, .2], [False, True, True, True], ["negative", "positive", "", ""], "between"),
    ("abac", [.1, .2, .9, .5], None, [""] * 4, "answers are equal")])
def test_group_pairs_are_best_against_worst(answers, rewards, ended, roles, why):
    """Eq. 2; an answer that was cut is never the positive, but may be the negative."""
    rows = rows_of(answers, rewards, ended)
    rba.decide_pairs(rows, "rba-group", "none", 0)
    assert [row["role"] for row in rows] == roles and rows[-1]["why"] in (why, "")
    assert all(bool(row["role"]) != bool(row["why"]) for row in rows)
    pair = [(rows[roles.index(role)]["id"], "answer") for role in ("positive", "negative") if any(roles)]
    assert rba.pair_up(rows, "rba-group") == [tuple(pair)] * any(roles)


def test_single_pairs_are_y_ref_against_the_own_answer():
    rows = rows_of(["a", "the reference", "b"], [0, 0, 0], [False, True, True])
    rba.decide_pairs(rows, "rba-single", "none", 0)
    assert [row["role"] for row in rows] == ["negative", "", "negative"] and rows[1]["why"] == "equals y_ref"
    pairs = [((row["id"], "y_ref"), (row["id"], "answer")) for row in rows]
    assert rba.pair_up(rows, "rba-single") == [pairs[0], pairs[2]]
    [alone] = rows_of(["a"], [0.5])                       # a group of one, as sqa, is in rba-group by Eq. 6
    rba.decide_pairs([alone], "rba-group", "none", 0)
    assert rba.pair_up([alone], "rba-group") == [((alone["id"], "y_ref"), (alone["id"], "answer"))]


def test_shuffled_pairs_have_no_direction():
    """Every answer that ended is as often the positive, every answer the negative; the cut one never is the
    positive, as without the control: what is left out is the reward alone."""
    positive, negative, single = Counter(), Counter(), 0
    for seed in range(600):
        rows = rows_of("abcd", [.1, .9, .3, .2], [True, False, True, True])
        rba.decide_pairs(rows, "rba-group", "shuffled", seed)
        assert [row["reward"] for row in rows] == [.1, .9, .3, .2]
        for s, row in enumerate(rows):
            positive[s] += row["role"] == "positive"
            negative[s] += row["role"] == "negative"
        whole, cut = *rows_of("a", [0.0]), *rows_of("a", [0.0], [False])
        rba.decide_pairs([whole], "rba-single", "shuffled", seed)
        rba.decide_pairs([cut], "rba-single", "shuffled", seed)
        single += whole["role"] == "positive"
        if whole["role"] == "positive":
            [pair] = rba.pair_up([whole], "rba-single")
            assert pair == ((whole["id"], "answer"), (whole["id"], "y_ref"))
        assert cut["role"] == ""
    assert positive[1] == 0 and 240 < single < 360        # a half
    assert all(160 < positive[s] < 240 for s in (0, 2, 3)) and all(100 < negative[s] < 200 for s in range(4))


@pytest.mark.parametrize("control", ["none", "positive"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("reference", ["init", "none"])
@pytest.mark.parametrize("objective", ["rba-group", "rba-single"])
def test_losses_by_hand(objective, reference, reduction, control):
    """L_CE, the preference loss and its gradient of two groups of four and one of one, against a loop over
    pairs in plain numbers."""
    generator, args = torch.Generator().manual_seed(1), SimpleNamespace(
        objective=objective, reference=reference, ce_reduction=reduction, control=control, beta=0.2,
        lambda_ce=0.2)
    groups = [rows_of("abcd", [.1, .9, .3, .2]), rows_of("a", [.5]), rows_of("efgh", [.1, .1, .1, .1])]
    log_probs, wanted, ce_wanted, pushed = {}, 0.0, [], {}
    for rows in groups:
        rba.decide_pairs(rows, objective, "none", 0)
        for s, row in enumerate(rows):
            for which, length in (("y_ref", 3 + s), ("answer", 2)):
                lp = -torch.rand(length, generator=generator, dtype=torch.float64)
                log_probs[row["id"], which] = lp.requires_grad_()
    for rows in groups:
        own = [(log_probs[row["id"], "y_ref"], log_probs[row["id"], "answer"]) for row in rows]
        refs = [(row["logp_y_ref"], row["logp_answer"]) if reference == "init" else (0, 0) for row in rows]
        for y_ref, _ in own:
            ce_wanted.append(-float(y_ref.detach().sum()) / (1 if reduction == "sum" else len(y_ref)))
        pairs = [((s, 0), (s, 1)) for s in range(len(rows))]
        if objective == "rba-group" and len(rows) > 1:
            pairs = [((1, 1), (0, 1))] if rows[1]["reward"] == .9 else []                  # a tie: none
        for (s, k), (t, j) in pairs:
            plus = 0.2 * (float(own[s][k].sum()) - refs[s][k])
            minus = 0.2 * (float(own[t][j].sum()) - refs[t][j]) * (control == "none")
            wanted += math.log1p(math.exp(minus - plus))
            pushed[id(own[s][k])], pushed[id(own[t][j])] = -1, 1 if control == "none" else 0
    ce, found = rba.losses(log_probs, groups, args)
    assert ce.tolist() == pytest.approx(ce_wanted)
    assert float(found["loss/preference"].sum().detach()) == pytest.approx(wanted)
    found["loss/preference"].sum().backward()
    for lp in log_probs.values():
        slope = 0.0 if lp.grad is None else float(lp.grad.sum())
        assert np.sign(slope) == pushed.get(id(lp), 0)


def test_rounding_is_no_preference():
    """Where pi_theta is pi_ref but for rounding, the accuracy is a half."""
    [row], args = rows_of("a", [0.5]), SimpleNamespace(objective="rba-single", reference="init", beta=0.1,
                                                       ce_reduction="sum", control="none", lambda_ce=0.0)
    rba.decide_pairs([row], "rba-single", "none", 0)
    for shift, wanted in ((1e-3, 0.5), (-1e-3, 0.5), (0.1, 1.0), (-0.1, 0.0)):
        log_probs = {(row["id"], "y_ref"): torch.tensor([-1.0 + shift]),
                     (row["id"], "answer"): torch.tensor([-2.0])}
        _, metrics = rba.losses(log_probs, [[row]], args)
        assert metrics["rewards/accuracies"].tolist() == [wanted]


# ------------------------------------------------------------------------------ distillation, chunks, batches
def test_kd_matches_torchs_own_kl_where_padded_vocabularies_differ():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(4, 9, generator=generator), torch.randn(4, 7, generator=generator)
    wanted = F.kl_div(student.log_softmax(-1), teacher[:, :7].softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(sft.kl_rows(teacher, student), wanted, rtol=1e-4, atol=1e-5)


def test_kd_asks_the_teacher_behind_the_opening_of_short_answers(groups, model):
    """Where student and teacher are one LLM and the words were heard right, nothing but the opening differs:
    of an instruct item nothing is left, of an sqa item KL(pi_T behind the opening || pi without) of its one
    word, here by transformers' own float32 model."""
    item, said = common.read_items(groups, "train")[0], "It is Paris. So it's "
    items = [dict(item, opening=opening, response="Paris") for opening in ("", said)]
    heard, teacher = [model.read(item["text"]) for item in items], sft.load_teacher(model, "smollm2-135m")
    llm = AutoModelForCausalLM.from_pretrained(common.resolve("smollm2-135m"), dtype=torch.float32)
    before, after, _ = common.chat_parts(model.tokenizer, items[0]["prompt"])
    opening, paris = model.tokenizer([said, "Paris"]).input_ids
    assert len(paris) == 1
    with torch.no_grad():
        same, short = sft.distillation(model, teacher, items, heard).tolist()
        p, q = (llm(torch.tensor([before + heard[0]["ids"] + after + begun])).logits[0, -1].log_softmax(-1)
                for begun in (opening, []))
    wanted = F.kl_div(q, p, reduction="sum", log_target=True)
    assert abs(same) < 1e-3 and short == pytest.approx(float(wanted), rel=0.1) and short > 1


def test_chunks_give_the_same_values_and_gradients():
    x, y, weight = torch.randn(11, 3, requires_grad=True), torch.randn(11, 3), torch.randn(11)
    whole, = torch.autograd.grad(((x ** 3 * y).sum(-1) * weight).sum(), x)
    for size in (1, 4, 11, 50):
        chunked = common.by_chunks(lambda rows, others: (rows ** 3 * others).sum(-1), x, y, size=size)
        torch.testing.assert_close(chunked, (x ** 3 * y).sum(-1))
        torch.testing.assert_close(torch.autograd.grad((chunked * weight).sum(), x)[0], whole)
    with torch.no_grad():
        chunked = common.by_chunks(lambda rows: (rows ** 3).sum(-1), x, size=4)
    torch.testing.assert_close(chunked, (x ** 3).sum(-1))


def test_token_batches_hold_all_within_the_limit():
    generator = np.random.default_rng(0)
    for limit in (1, 7, 50, 1000):
        lengths = generator.integers(1, 30, 23).tolist()
        batches = common.token_batches(lengths, limit)
        assert [i for batch in batches for i in batch] == list(range(23))
        for batch, after in zip(batches, [*batches[1:], None]):
            assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= limit
            if after:                                     # none could have held one more
                assert max(lengths[i] for i in [*batch, after[0]]) * (len(batch) + 1) > limit
    assert common.token_batches([], 5) == []


def test_learning_rate_and_batches():
    rates = [common.learning_rate(step, 40, 1e-3) for step in range(40)]
    assert rates[0] == pytest.approx(2.5e-4) and max(rates) < 1e-3 + 1e-12 and rates[-1] < 1e-5
    batches = common.batches(14, 4, 7, "seed")
    seen = sum(batches, [])
    assert sorted(seen[:14]) == list(range(14)) and sorted(seen[14:28]) == list(range(14))
    assert seen[:14] != seen[14:28] and batches[3] == common.batches(14, 4, 9, "seed")[3] == seen[12:16]


def test_what_processes_share_does_not_depend_on_their_number(monkeypatch):
    parts = [[1, 2], [3], [4, 5, 6], [7], []]
    for processes in (1, 2, 3, 7):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        found = []

        def gather(mine, processes=processes):            # what each of the others has in this turn
            turn = [x for x in parts[len(found) * processes:][:processes]]
            assert mine == [10 * value for value in (turn[0] if turn else [])]
            found.append(turn)
            return [10 * value for part in turn for value in part]
        monkeypatch.setattr(common, "gather", gather)
        assert common.shared(parts, lambda part: [10 * v for v in part]) == [10, 20, 30, 40, 50, 60, 70]


# ---------------------------------------------------------------------------------------------- rewards, logs
def test_the_reward_of_s2tt_is_sentence_bleu_and_else_cosine():
    reward = common.Reward(SimpleNamespace(reward="semantic", embedder="minilm-l6"), "cpu")
    items = [dict(task="s2tt", language="French", response="je vais au magasin"),
             dict(task="instruct", response="Paris is in France."), dict(task="sqa", response="Paris")]
    answers = ["je vais au marché", "Paris is in France.", "A fish"]
    found = reward(items, answers)
    assert found[0] == pytest.approx(sacrebleu.sentence_bleu(answers[0], [items[0]["response"]]).score / 100)
    assert found[1] == pytest.approx(1, abs=1e-5) and found[2] < 0.5
    [chinese] = reward([dict(task="s2tt", language="Chinese", response="我今天去商店买东西")], ["我今天去商店买"])
    assert chinese > 0.5                                  # 0 in sacrebleu's default tokens: one word


def test_the_samples_are_described_by_hand():
    rng, samples = random.Random(0), []
    for group in "pq":
        for voice in "ab":
            samples.append(dict(group=group, voice=voice, reward=rng.random(), role="", ended=True,
                                ids=[1, 2], text="one two three", heard="one two three"))
    samples[0] |= dict(role="positive", heard="one two three")
    samples[1] |= dict(role="negative", heard="one too three")
    found = rba.describe_samples(samples, "rba-group")
    r = [row["reward"] for row in samples]
    assert found["samples/reward"] == pytest.approx(sum(r) / 4)
    assert found["samples/reward/a"] == pytest.approx((r[0] + r[2]) / 2)
    assert found["samples/headroom"] == pytest.approx((abs(r[0] - r[1]) + abs(r[2] - r[3])) / 4)
    assert found["samples/variance_within"] == pytest.approx(((r[0] - r[1]) ** 2 + (r[2] - r[3]) ** 2) / 4)
    within, between = found["samples/variance_within"], ((r[0] + r[1] - r[2] - r[3]) / 2) ** 2 / 2
    assert found["samples/variance_between"] == pytest.approx(between - within / 2)
    assert found["samples/positive_heard_better"] == 1 and found["samples/in_a_pair"] == 0.5
    assert "samples/positive_heard_better" not in rba.describe_samples(samples, "rba-single")


@pytest.mark.parametrize("lambda_ce", [0.2, 0.0])
def test_an_update_backpropagates_eq_5(groups, float32_model, monkeypatch, lambda_ce):
    """Gradients and log of `backward` against the formula on each utterance alone: L_G over two pairs, L_CE
    over the nine utterances of a batch in which one group has no pair and another stands twice;
    micro-batches change nothing, what no loss reads is not computed. float32, as only order differs there."""
    model, items = float32_model, common.read_items(groups, "train")
    heard = common.listen_to_split(model, groups, "train", items, window=12.0)
    batch, samples, computed = [[0, 1, 2, 3], [4], [0, 1, 2, 3]], {}, []
    for s, i in enumerate([0, 1, 2, 3, 4]):
        ids = model.answer_ids(("It is Paris.", "Lyon.", "I do not know it.", "France.", "Boil it.")[s])[:-1]
        samples[items[i]["id"]] = dict(id=items[i]["id"], ids=ids, ended=True, answer=str(s),
                                       logp_y_ref=-20.0, logp_answer=-9.0 - s, why="",
                                       role=("positive", "", "negative", "", "")[s])
    samples[items[4]["id"]]["why"] = "equals y_ref"
    args = SimpleNamespace(objective="rba-group", beta=0.1, lambda_ce=lambda_ce, ce_reduction="sum",
                           reference="init", control="none", micro_tokens=4000, max_new=16)
    original = common.token_log_probs
    def log_p(i, y):
        [lp] = original(model.llm, model.speech_prompts([heard[i]], [""]), [[y]])
        return lp.sum()
    own = [samples[items[i]["id"]]["ids"] + [model.end_id] for i in range(5)]
    wanted = -2 * F.logsigmoid(0.1 * (log_p(0, own[0]) + 9) - 0.1 * (log_p(2, own[2]) + 11)) / 2
    for i in [0, 1, 2, 3] * 2 + [4]:
        wanted = wanted - lambda_ce * log_p(i, model.answer_ids(items[i]["response"])) / 9
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.trainable().items()}

    def counted(llm, prompts, answers):
        computed.append(sum(map(len, answers)))
        return original(llm, prompts, answers)
    monkeypatch.setattr(common, "token_log_probs", counted)
    for args.micro_tokens in (4000, 100):
        model.zero_grad()
        computed.clear()
        metrics = rba.backward(model, batch, items, heard, samples, args)
        assert metrics["loss"] == pytest.approx(float(wanted.detach()), rel=1e-4) and metrics["pairs"] == 2
        assert sum(computed) == 4 + 9 * (lambda_ce > 0) and ("loss/ce" in metrics) == (lambda_ce > 0)
        for name, p in model.trainable().items():
            assert (p.grad - gradients[name]).norm() <= 1e-3 * gradients[name].norm() + 1e-6, name


def test_both_objectives_share_the_first_rounds_samples(groups, model, tmp_path):
    """rba-single, given what rba-group drew of the same pi_ref, has the rows that it draws by itself."""
    items, [own, *_] = common.read_items(groups, "train"), [[0, 1, 2, 3]]
    heard = common.listen_to_split(model, groups, "train", items, window=12.0)
    args = SimpleNamespace(work=tmp_path, seed=0, max_new=8, temperature=1.0, control="none")

    def drawn_by(name, objective, drawn, model=model):
        args.objective, run = objective, SimpleNamespace(name=name)
        reward = lambda items, answers: list(map(len, answers))
        return rba.sample_and_judge(model, reward, items, heard, [own], 0, run, args, drawn)
    alone, group = drawn_by("alone", "rba-single", {}), drawn_by("group", "rba-group", {})
    before = {id_: dict(row) for id_, row in group.items()}
    shared = drawn_by("shared", "rba-single", group, model=None)          # nothing is drawn again
    assert shared == alone and group == before and group != shared
    files = [(tmp_path / "samples" / f"{name}.jsonl").read_text() for name in ("alone", "shared")]
    assert files[0] == files[1]
