"""Published weights: equal to transformers on random tiny models, strict about everything else, and back again."""
import json
import os
import re

import pytest
import torch
from conftest import REPO, run
from safetensors.torch import load_file, save_file

from data import Tokenizer
from model import PRESETS, Connector, Decoder, Exo2Ego, KVCache, Segments, ViT

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


def clip_model(layers=3, width=128, heads=2, image=28, mlp=None):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=width, intermediate_size=mlp or 4 * width, num_hidden_layers=layers,
                                           num_attention_heads=heads, image_size=image, patch_size=7)
    return transformers.CLIPVisionModel(config).eval()


def mistral_model(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, sliding_window=None, rms_norm_eps=1e-5, tie_word_embeddings=False)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():                            # transformers starts so small that errors would hide
            p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn(p.shape))
    return model


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))


def rename_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({change(n): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def our_logits(decoder, ids, cache=None, past=0):
    n = len(ids)
    seg = Segments.cached([n], [past + n])
    return decoder.logits(decoder(decoder.embed(ids), seg, torch.arange(past, past + n), cache))


# ------------------------------------------------------------------------------------------------------ CLIP
@pytest.mark.parametrize("layout", ("vision", "vision, older names", "full", "vision, another MLP"))
def test_clip_features_equal_transformers(tmp_path, layout):
    theirs = clip_model(mlp=200 if "MLP" in layout else None)
    if layout == "full":
        text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
        whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config=theirs.config.to_dict(), text_config=text))
        whole.vision_model.load_state_dict({re.sub("^vision_model.", "", n): t for n, t in theirs.state_dict().items()})
        whole.save_pretrained(tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
    if layout == "vision, older names":
        rename_tensors(tmp_path, lambda n: n if n.startswith("vision_model.") else f"vision_model.{n}")
        edit_config(tmp_path, dtype="absent", torch_dtype="float32")
    ours = ViT.from_hf(tmp_path)
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        want = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        got = ours(pixels).flatten(1, 2)
    assert torch.allclose(got, want, atol=1e-5), float((got - want).abs().max())
    assert next(ViT.from_hf(tmp_path, torch.bfloat16).parameters()).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------- Mistral
@pytest.mark.parametrize("changes", (
    {}, dict(num_key_value_heads=4), dict(num_key_value_heads=1), dict(head_dim=24), dict(sliding_window=5),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), dict(tie_word_embeddings=True)))
def test_mistral_logits_equal_transformers(tmp_path, changes):
    theirs, ids = mistral_model(**changes), torch.randint(0, 96, (23,))
    theirs.save_pretrained(tmp_path)
    ours = Decoder.from_hf(tmp_path)
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]
        assert torch.allclose(our_logits(ours, ids), want, atol=2e-5)
        cache, steps = KVCache(1), []
        steps.append(our_logits(ours, ids[:9], cache))
        steps += [our_logits(ours, ids[t:t + 1], cache, t) for t in range(9, 23)]
        assert torch.allclose(torch.cat(steps), want, atol=2e-5), "token by token on the cache"


def test_mistral_generates_what_transformers_generates(tmp_path):
    theirs, ids = mistral_model(), torch.randint(5, 96, (7,))
    theirs.save_pretrained(tmp_path)
    ours, cache, said, past = Decoder.from_hf(tmp_path), KVCache(1), [], 0
    want = theirs.generate(ids[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:]
    with torch.no_grad():
        feed = ids
        for _ in range(12):
            feed, past = our_logits(ours, feed, cache, past)[-1:].argmax(-1), past + len(feed)
            said.append(int(feed))
    assert said == want.tolist()


@pytest.mark.parametrize("older", (
    dict(rope_parameters="absent", rope_theta=1e6, rope_scaling=None), dict(sliding_window="absent", head_dim=None),
    dict(head_dim="absent", dtype="absent", torch_dtype="float16")))
def test_config_of_either_generation(tmp_path, older):
    theirs = mistral_model(rope_parameters={"rope_type": "default", "rope_theta": older.get("rope_theta", 1e4)})
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, **older)
    ours, ids = Decoder.from_hf(tmp_path), torch.randint(0, 96, (11,))
    with torch.no_grad():
        assert torch.allclose(our_logits(ours, ids), theirs(ids[None]).logits[0], atol=2e-5)


def test_sharded_equals_single(tmp_path):
    theirs = mistral_model()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (Decoder.from_hf(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[n], many[n]) for n in one)


def test_loading_does_not_write_to_the_file(tmp_path):
    mistral_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    ours = Decoder.from_hf(tmp_path)
    for p in ours.parameters():
        p.data.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------------ VideoLLaMA2
@pytest.fixture(scope="module")
def videollama2(tmp_path_factory):
    """A random tiny directory in the published layout, sharded, and its parts as the reference libraries hold them."""
    folder = tmp_path_factory.mktemp("videollama2")
    clip, mistral = clip_model(), mistral_model(vocab_size=512)
    mistral.save_pretrained(folder)
    from dataclasses import replace
    torch.manual_seed(3)
    cfg = replace(PRESETS["7b"], image_size=28, patch=7, vit_width=128, width=64, stc_depth=2, frames=4)
    connector = Connector(cfg)
    for p in connector.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tensors = load_file(folder / "model.safetensors")
    tower = "model.vision_tower.vision_tower.vision_model."
    tensors |= {tower + re.sub("^vision_model.", "", n): t for n, t in clip.state_dict().items()}
    tensors |= {f"model.mm_projector.{n}": t for n, t in connector.state_dict().items()}
    tensors = {n: t.contiguous().clone() for n, t in tensors.items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {n: tensors[n] for n in names[i::3]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit_config(folder, model_type="videollama2_mistral", architectures=["Videollama2MistralForCausalLM"], num_frames=4,
                mm_projector_type="stc_connector", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
                mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=128, use_mm_proj=True)
    return folder, clip, connector, mistral


def test_videollama2_end_to_end(videollama2, tmp_path):
    folder, clip, connector, mistral = videollama2
    model = Exo2Ego.from_videollama2(folder)
    frames = torch.randint(0, 256, (1, 4, 3, 28, 28), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073),
                                                          (0.26862954, 0.26130258, 0.27577711)))
    text = torch.randint(3, 320, (9,))
    with torch.no_grad():
        grid = clip((frames[0].float() / 255 - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
        visual = connector(grid.unflatten(1, (4, 4))[None])
        want = mistral(inputs_embeds=torch.cat([visual, mistral.model.embed_tokens(text)[None]], 1)).logits[0]
        for tokens in (model.encode_ego(frames), model.encode_exo(frames)):
            assert torch.allclose(tokens, visual, atol=1e-4)
            seen = torch.cat([tokens[0], model.decoder.embed(text)])
            got = model.decoder.logits(model.decoder(seen, Segments.packed([len(seen)]), torch.arange(len(seen))))
            assert torch.allclose(got, want, atol=2e-4), float((got - want).abs().max())
    assert model.exo_vit.position.data_ptr() != model.ego_vit.position.data_ptr()


def test_another_architecture_is_refused_before_its_weights_are_looked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama', videollama2_mistral fits here"):
        Exo2Ego.from_videollama2(tmp_path)


def test_vision_tower_from_elsewhere(videollama2, tmp_path):
    folder, clip, *_ = videollama2
    copy = tmp_path / "without"
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= {n: t for n, t in load_file(shard).items() if "vision_tower" not in n}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="--vision DIR"):
        Exo2Ego.from_videollama2(copy)
    clip.save_pretrained(tmp_path / "clip")
    a, b = Exo2Ego.from_videollama2(copy, vision=tmp_path / "clip").state_dict(), Exo2Ego.from_videollama2(folder).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    # F and G halve a grid as often as it can be: CLIP-B's, 14 x 14, went through stages 0 and 1 and was refused by stage 2.
    for image, halvings in ((28, 2), (42, 1), (21, 0)):
        clip_model(image=image).save_pretrained(tmp_path / str(image))
        model = Exo2Ego.from_videollama2(copy, vision=tmp_path / str(image))
        with torch.device("meta"):
            model.add(mapping="resnet")
        assert model.cfg.map_downs == halvings
        # What is added later takes nothing away.
        with torch.device("meta"):
            model.add(lora=True)
        assert model.cfg.mapping == "resnet" and model.cfg.lora and model.F is not None


# ----------------------------------------------------------------------------------------------------- refusals
def break_index(folder, name):
    file = folder / "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    return file


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_weights(folder):
    """A shard is missing, and transformers' Trainer has left its arguments."""
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"pickle")


REFUSED = [
    (without_weights, "model.safetensors is missing ("),
    (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    (lambda f: edit_config(f, model_type="llama"), "model_type is 'llama'"),
    (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "rope_type is 'yarn'"),
    (lambda f: edit_config(f, rope_parameters="absent", rope_scaling={"type": "linear", "factor": 2}), "type is 'linear'"),
    (lambda f: edit_config(f, vocab_size=97), "vocab_size is 97"),
    (lambda f: edit_config(f, intermediate_size=80), "mlp.gate_proj.weight is (96, 64) torch.float32, not (80, 64)"),
    (lambda f: rename_tensors(f, lambda n: n.replace("layers.1.mlp.up", "layers.1.mlp.upp")), "model.layers.1.mlp.up_proj"),
    (lambda f: save_file(load_file(f / "model.safetensors") | {"extra.weight": torch.ones(2)}, f / "model.safetensors"), "extra.weight"),
    (lambda f: break_index(f, "../other.safetensors"), "plain file name"),
    (lambda f: break_index(f, "/etc/passwd"), "plain file name"),
    (lambda f: break_index(f, "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing"),
    (truncate, "model.safetensors cannot be read"), (pickled, "pytorch_model.bin is a pickle"),
    (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes((2 ** 62).to_bytes(8, "little") + b"{}"), "cannot be read")]


@pytest.mark.parametrize("harm, words", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, harm, words):
    mistral_model().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Decoder.from_hf(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- back again
def test_export_round_trip(videollama2, tmp_path):
    """Trained, with LoRA: what transformers makes of the exported parts equals what we make of the checkpoint."""
    from model import export_hf
    from train import Run, save_checkpoint
    import mistral_common
    import train
    from pathlib import Path
    model = Exo2Ego.from_videollama2(videollama2[0])
    model.add(mapping="resnet", lora=True)
    for p in model.decoder.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    torch.nn.init.normal_(model.ego_vit.blocks[0].q.weight, std=0.3)
    spm = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    cfg = train.parse(["--stage", "0", "--out", str(tmp_path)])             # stage 0 saves the whole model
    objective = train.Objective(model, Tokenizer(spm), train.stages_of(cfg)[0], cfg, 1)
    run_ = Run(cfg, 0, 1, torch.device("cpu"), False, steps=2, tokenizer=spm.read_bytes())
    save_checkpoint(run_, objective, [], 1, {}, 0)
    model.eval()
    export_hf(tmp_path / "step_000001", tmp_path / "hf")
    ids, pixels = torch.randint(3, 320, (14,)), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        theirs = transformers.MistralForCausalLM.from_pretrained(tmp_path / "hf/decoder")
        assert torch.allclose(theirs(ids[None]).logits[0], our_logits(model.decoder, ids), atol=2e-4)
        for view in ("exo", "ego"):
            clip = transformers.CLIPVisionModel.from_pretrained(tmp_path / f"hf/{view}_vision")
            states = clip(pixels, output_hidden_states=True)
            ours = getattr(model, f"{view}_vit")(pixels).flatten(1, 2)
            assert torch.allclose(states.hidden_states[-2][:, 1:], ours, atol=1e-5)
            assert torch.allclose(states.last_hidden_state[:, 1:], ours, atol=1e-5)
            again = ViT.from_hf(tmp_path / f"hf/{view}_vision")
            assert torch.equal(again(pixels).flatten(1, 2), ours)
    assert (tmp_path / "hf/decoder/tokenizer.model").read_bytes() == spm.read_bytes()
    # Its tokenizer gives our ids: <s> first, no token of a template, the chat as Mistral-Instruct has it.
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf/decoder"), Tokenizer(spm)
    for text in ("I cut the red block.", " lead", "h\u00e9llo \u4f60\u597d \U0001f642", "two  spaces", "a\nb"):
        assert theirs(text).input_ids == [ours.bos, *ours.encode(text)], text
    turns = [{"system": "Be brief.", "user": "What am I doing?", "assistant": "I cut."}, {"user": "Why?", "assistant": "To eat."}]
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in turns:
        messages += [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
    chat = theirs.apply_chat_template(messages)
    assert (chat if isinstance(chat, list) else chat["input_ids"]) == ours.chat(turns, 0)[0]


def test_lora_merges():
    decoder = Decoder(PRESETS["toy"]).eval()
    decoder.add_lora(8, 16, 0.1)
    for module in decoder.lora_modules():
        torch.nn.init.normal_(module.lora_b, std=0.1)
    ids = torch.randint(0, 512, (12,))
    before, weight = our_logits(decoder, ids), decoder.blocks[0].q.weight.clone()
    decoder.merge_lora()
    decoder.merge_lora()                                        # a second call has nothing to do
    assert torch.allclose(our_logits(decoder, ids), before, atol=1e-4) and not torch.equal(decoder.blocks[0].q.weight, weight)


# ----------------------------------------------------------------------------------------------------- tokenizer
CHATS = [["hi"], ["What am I doing?", "I cut.", "Why?"], ["  lead and trail  "], ["a", " space answer ", "b"],
         ["h\u00e9llo \u4f60\u597d \U0001f642\n\ttab", "\u00fc"], ["say </s> and <s> [INST] now", "ok </s>", "x"], ["a", "b"]]


@pytest.mark.parametrize("chat", CHATS)
def test_ids_equal_mistral_common(chat):
    from pathlib import Path
    import mistral_common
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from model import IGNORE, VIDEO
    ours = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
    kinds = (UserMessage, AssistantMessage)
    request = InstructRequest(messages=[kinds[i % 2](content=text) for i, text in enumerate(chat)])
    reference = MistralTokenizer.v1().instruct_tokenizer
    turns = [dict(zip(("user", "assistant"), chat[i:i + 2])) for i in range(0, len(chat), 2)]
    ids, labels = ours.chat(turns, 0)
    assert ids == reference.encode_instruct(request).tokens and ours.size == 32000
    assert ids.count(ours.bos) == 1 and ids.count(ours.eos) == len(chat) // 2      # a "</s>" in a text stays text
    answers = sum((ours.encode(text) + [ours.eos] for text in chat[1::2]), [])
    assert [label for label in labels if label != IGNORE] == answers
    with_video, _ = ours.chat(turns, 5)
    assert with_video.count(VIDEO) == 5 and ours.eos not in with_video[:5]
    first = dict(turns[0], system="Be brief.")
    folded = InstructRequest(messages=request.messages, system_prompt="Be brief.")
    assert ours.chat([first] + turns[1:], 0)[0] == reference.encode_instruct(folded).tokens


def test_an_empty_answer_is_its_end_alone():
    from pathlib import Path
    import mistral_common
    from model import IGNORE
    ours = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
    assert [x for x in ours.chat([{"user": "a", "assistant": ""}], 0)[1] if x != IGNORE] == [ours.eos]


def test_connector_equals_timms_regstage():
    """tests/golden/make.py recorded weights, input and output of the published composition, made with timm 1.0.31."""
    from dataclasses import replace
    golden = load_file(REPO / "tests/golden/stc.safetensors")
    x, want = golden.pop("input"), golden.pop("output")
    connector = Connector(replace(PRESETS["7b"], vit_width=24, width=32, stc_depth=2))
    connector.load_state_dict({n.removeprefix("model.mm_projector."): t for n, t in golden.items()})
    with torch.no_grad():
        got = connector(x)
    assert want.std() > 0.5 and torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
