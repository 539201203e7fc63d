"""The network keeps its promises: exact packing and caching, the published shapes."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import IGNORE, PRESETS, VIDEO, Connector, Decoder, Exo2Ego, KVCache, LoRALinear, Mapping, RegNetBlock, Segments, ViT

TOY = PRESETS["toy"]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_shapes_of_the_presets():
    for name, (grid, tokens) in {"toy": (4, 8), "small": (8, 5 * 5 * 5), "7b": (24, 9 * 13 * 13)}.items():
        cfg = PRESETS[name]
        with torch.device("meta"):
            frames = torch.empty(2 * cfg.frames, 3, cfg.image_size, cfg.image_size)
            features = ViT(cfg)(frames)
            assert features.shape == (2 * cfg.frames, grid, grid, cfg.vit_width)
            clip = features.unflatten(0, (2, cfg.frames))
            assert Connector(cfg)(clip).shape == (2, tokens, cfg.width) and cfg.visual_tokens == tokens
            for kind in ("resnet", "mlp"):
                assert Mapping(cfg, kind)(clip).shape == clip.shape


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        cfg = PRESETS["7b"]
        layer = 4 * (1024 * 1024 + 1024) + 2 * 4 * 1024 * 1024 + 5 * 1024 + 4 * 1024    # attention, MLP, two norms
        unused = layer + 2 * 1024                               # CLIP's last layer and post norm, which are never run
        assert parameters(ViT(cfg)) + unused == 303_507_456
        assert parameters(Connector(cfg)) == 489_188_608
        assert parameters(Decoder(cfg)) == 7_241_732_096


def test_connector_has_the_published_names():
    with torch.device("meta"):
        tensors = {n: tuple(t.shape) for n, t in Connector(PRESETS["7b"]).state_dict().items()}
    assert tensors["s1.b1.conv1.conv.weight"] == (4096, 1024, 1, 1)
    assert tensors["s1.b1.conv2.conv.weight"] == (4096, 1, 3, 3)
    assert tensors["s1.b1.se.fc1.weight"] == (256, 4096, 1, 1)
    assert tensors["s1.b1.downsample.conv.weight"] == (4096, 1024, 1, 1)
    assert tensors["sampler.0.weight"] == (4096, 4096, 2, 2, 2)
    assert {"s2.b4.conv3.bn.bias", "readout.0.weight", "readout.2.bias"} <= tensors.keys()


@pytest.mark.parametrize("padding", (0, 1))
@pytest.mark.parametrize("side", (4, 5))
def test_down_sampling_equals_conv3d(padding, side):
    from dataclasses import replace
    connector = Connector(replace(TOY, stc_padding=padding))
    x = torch.randn(2, 4, side, side, 96)
    with torch.no_grad():
        plain = connector.sampler(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        assert torch.allclose(connector.halve(x), plain, atol=1e-5)


def test_regnet_block_equals_plain_convolutions_and_starts_as_silu():
    torch.manual_seed(0)
    block, x = RegNetBlock(96, 96), torch.randn(3, 4, 4, 96)
    assert torch.allclose(block(x), F.silu(x), atol=1e-6)
    nn.init.normal_(block.conv3.bn.weight)
    norm = lambda h, layer: layer(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    image = x.permute(0, 3, 1, 2)
    h = F.silu(norm(block.conv1.conv(image), block.conv1.bn))
    h = F.silu(norm(block.conv2.conv(h), block.conv2.bn))
    h = h * torch.sigmoid(block.se.fc2(F.silu(block.se.fc1(h.mean((2, 3), keepdim=True)))))
    plain = F.silu(norm(block.conv3.conv(h), block.conv3.bn) + image)
    assert torch.allclose(block(x), plain.permute(0, 2, 3, 1), atol=1e-5)


def test_mapping_reaches_neighbours_only_with_convolutions():
    """resnet can move what it sees across the grid; mlp, the ablation, cannot."""
    for kind, spreads in (("resnet", True), ("mlp", False)):
        x = torch.randn(1, 1, 4, 4, 96, requires_grad=True)
        Mapping(TOY, kind)(x)[0, 0, 0, 0].square().sum().backward()
        assert (x.grad[0, 0, 3, 3].abs().sum() > 0) == spreads and x.grad[0, 0, 0, 0].abs().sum() > 0


def prompts(model, lens):
    torch.manual_seed(1)
    n = model.cfg.visual_tokens
    visual = torch.randn(len(lens), n, model.cfg.width)
    ids = [torch.cat([torch.tensor([1]), torch.full((n,), VIDEO), torch.randint(3, 400, (k,))]) for k in lens]
    return visual, ids


def test_packed_equals_one_by_one():
    torch.manual_seed(0)
    model = Exo2Ego(TOY).eval()
    visual, ids = prompts(model, (5, 12, 40))
    labels = [torch.where(torch.arange(len(i)) > 12, i, IGNORE) for i in ids]
    both = model.text_losses(visual, torch.cat(ids), torch.cat(labels), [len(i) for i in ids])
    alone = [model.text_losses(visual[k:k + 1], i, l, [len(i)]) for k, (i, l) in enumerate(zip(ids, labels))]
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)
    total = model.log_likelihood(visual, torch.cat(ids), torch.cat(labels), [len(i) for i in ids])
    for k, (i, l) in enumerate(zip(ids, labels)):
        one = model.log_likelihood(visual[k:k + 1], i, l, [len(i)])
        assert torch.allclose(total[k], one[0], atol=1e-4)


@pytest.mark.parametrize("lens", [(3, 9, 4), (6, 6, 6)])
def test_cache_equals_no_cache(lens):
    torch.manual_seed(0)
    model = Exo2Ego(TOY).eval()
    visual, ids = prompts(model, lens)
    fast = model.generate(visual, ids, eos=2, max_new=12)
    for k, written in enumerate(ids):                           # the slow way: all tokens again for every new one
        slow = []
        for _ in range(12):
            hidden = model.decoder(model.insert_visual_tokens(visual[k:k + 1], written), Segments.packed([len(written)]),
                                   torch.arange(len(written)))
            slow.append(int(model.decoder.logits(hidden[-1]).argmax()))
            if slow[-1] == 2:
                slow.pop()
                break
            written = torch.cat([written, torch.tensor(slow[-1:])])
        assert fast[k] == slow
    assert fast == [model.generate(visual[k:k + 1], [i], eos=2, max_new=12)[0] for k, i in enumerate(ids)]
    # An answer that has ended says no more, while others go on.
    end = fast[0][4]
    alone = [model.generate(visual[k:k + 1], [i], eos=end, max_new=12)[0] for k, i in enumerate(ids)]
    assert len(alone[0]) <= 4 and model.generate(visual, ids, eos=end, max_new=12) == alone


def test_lora_adds_alpha_over_rank_times_its_product():
    layer = LoRALinear(8, 8, bias=False)
    layer.add_lora(4, 12, 0.5)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 8)
    want = x @ layer.weight.T + 3 * x @ layer.lora_a.T @ layer.lora_b.T
    assert torch.allclose(layer.eval()(x), want, atol=1e-5)
    assert not torch.allclose(layer.train()(x), want, atol=1e-2), "in training its input has dropout"
    assert (PRESETS["7b"].lora_rank, PRESETS["7b"].lora_alpha, PRESETS["7b"].lora_dropout) == (128, 256, 0.1)


def test_lora_starts_at_the_base_and_merges():
    torch.manual_seed(0)
    decoder = Decoder(TOY).eval()
    x, seg = torch.randn(9, 96), Segments.packed((9,))
    run = lambda: decoder(x, seg, torch.arange(9))
    base = run()
    decoder.add_lora(4, 8, 0.0)
    assert torch.equal(run(), base)
    for module in decoder.lora_modules():
        nn.init.normal_(module.lora_b, std=0.02)
    with_lora = run()
    decoder.merge_lora()
    assert not torch.allclose(with_lora, base, atol=1e-3) and torch.allclose(run(), with_lora, atol=1e-5)
    assert not any("lora" in n for n, _ in decoder.named_parameters())


def test_a_text_loss_is_that_of_the_position_before():
    """Supervised in the middle and at the end: each loss stands at its token, all other places are zero."""
    torch.manual_seed(0)
    model = Exo2Ego(TOY).eval()
    visual, (ids,) = prompts(model, (10,))
    labels = torch.full_like(ids, IGNORE)
    where = torch.tensor([11, 12, 16, 18])
    labels[where] = ids[where]
    losses = model.text_losses(visual, ids, labels, [len(ids)])
    hidden = model.decoder(model.insert_visual_tokens(visual, ids), Segments.packed([len(ids)]), torch.arange(len(ids)))
    log_p = model.decoder.logits(hidden).log_softmax(-1)
    assert losses.nonzero().squeeze(1).tolist() == where.tolist()
    assert torch.allclose(losses[where], -log_p[where - 1, ids[where]], atol=1e-6)


def test_a_text_behind_a_cache_has_the_losses_of_the_whole():
    torch.manual_seed(0)
    model = Exo2Ego(TOY).eval()
    visual, (ids,) = prompts(model, (10,))
    labels = torch.where(torch.arange(len(ids)) > 12, ids, IGNORE)
    cache, start = KVCache(1), 10
    with torch.no_grad():
        whole = model.text_losses(visual, ids, labels, [len(ids)])
        model.hidden_states(model.insert_visual_tokens(visual, ids[:start]), [start], cache)
        rest = model.text_losses(None, ids[start:], labels[start:], [len(ids) - start], cache)
    assert torch.allclose(rest, whole[start:], atol=1e-5)


@pytest.mark.parametrize("blocks", ["none", "cheap", "blocks"])
def test_a_batch_without_text_runs_every_block_and_gives_zero(blocks):
    """Ranks of FSDP wait for one another in every block: a rank whose rows have no text must pass them all, both ways."""
    import train
    model = Exo2Ego(TOY)
    cfg = train.parse(["--stage", "1", "--recompute", blocks])
    objective = train.Objective(model, None, train.TOY[1][0], cfg, 1)
    train.wrap(train.Run(cfg, 0, 1, torch.device("cpu"), False), objective)
    passed = []
    for block in model.decoder.blocks:
        block.register_full_backward_hook(lambda *_: passed.append("back"))
        block.register_forward_hook(lambda *_: passed.append("forth"))
    visual = torch.randn(2, TOY.visual_tokens, TOY.width, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    losses = model.text_losses(visual[nothing], nothing, nothing, [])
    assert losses.shape == (0,)
    losses.sum().backward()
    assert passed.count("forth") >= TOY.layers and passed.count("back") == TOY.layers
    assert (visual.grad == 0).all() and (model.decoder.blocks[0].q.weight.grad == 0).all()


def test_one_forward_gives_what_each_loss_needs():
    """Ego and exo frames -> x, y, F(x), con_exo(F(x)) and [con_ego(x) ; con_exo(F(x))]; one view alone gives its own."""
    from dataclasses import replace
    torch.manual_seed(0)
    model = Exo2Ego(replace(TOY, mapping="resnet")).eval()
    ego, exo = torch.randint(0, 256, (2, 3, 4, 3, 48, 48), dtype=torch.uint8)
    seen = model(ego, exo[:2])
    x, y = model.patch_features(model.ego_vit, ego), model.patch_features(model.exo_vit, exo[:2])
    assert torch.equal(seen.x, x) and torch.equal(seen.y, y) and torch.equal(seen.fx, model.F(x))
    assert torch.equal(seen.estimate, model.exo_connector(model.F(x)))
    assert torch.equal(seen.visual, torch.cat([model.ego_connector(x), seen.estimate], 1)) and torch.equal(seen.visual, model.encode_ego(ego))
    assert torch.equal(model(exo=exo).visual, model.encode_exo(exo)) and model(exo=exo).x is None
    before = Exo2Ego(TOY).eval()
    assert before(ego, exo).visual.shape[1] == TOY.visual_tokens and before(ego, exo).fx is None


def test_fc_blocks_exchange_the_resnet_blocks_alone():
    """The paper's ablation keeps the sampling: only the blocks in the middle differ."""
    plain, fc = (dict(Mapping(TOY, kind).named_parameters()) for kind in ("resnet", "mlp"))
    blocks = [name for name in fc if name not in plain or fc[name].shape != plain[name].shape]
    assert {name.split(".")[1] for name in blocks} == {"4", "5", "6", "7"} and len(plain.keys() & fc.keys()) > 6
    features = torch.randn(1, 4, 4, 4, 96)
    assert not torch.equal(Mapping(TOY, "mlp")(features), features)


def test_a_small_lora_update_survives_the_merge_into_half_precision():
    """bfloat16 has three digits: an update of a thousandth of the weight would be rounded away."""
    torch.manual_seed(0)
    decoder = Decoder(TOY).eval().bfloat16()
    decoder.add_lora(4, 8, 0.0)
    layer = decoder.blocks[0].q
    nn.init.normal_(layer.lora_b, std=1e-3)
    before, update = layer.weight.float(), layer.lora_scale * layer.lora_b @ layer.lora_a
    decoder.merge_lora()
    assert torch.allclose(layer.weight - before, update, atol=1e-7)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}, "or transformers takes all for half precision"


def test_lora_starts_as_in_peft():
    torch.manual_seed(0)
    decoder = Decoder(TOY)
    decoder.add_lora(16, 32, 0.0)
    layer = decoder.blocks[0].down                              # 256 wide
    assert layer.lora_a.abs().max() <= 256 ** -0.5 and float(layer.lora_a.std()) == pytest.approx((3 * 256) ** -0.5, rel=0.05)
    assert (layer.lora_b == 0).all()


def test_places_for_a_video_need_a_video():
    with pytest.raises(ValueError, match="0 visual tokens for 2 places in the text"):
        Exo2Ego(TOY).insert_visual_tokens(None, torch.tensor([1, VIDEO, VIDEO, 5]))


def test_frames_that_are_normalised_already_are_refused():
    with pytest.raises(ValueError, match="frames are uint8, 0 to 255"):
        Exo2Ego(PRESETS["toy"]).encode_ego(torch.rand(1, 4, 3, 48, 48))


def test_patches_come_in_one_piece():
    """A view without the class token makes torch copy a connector's weights once for every row of patches when no
    gradient is wanted: 8 % of a stage-2 step."""
    grid = Exo2Ego(PRESETS["toy"]).exo_vit(torch.randn(2, 3, 48, 48))
    assert grid.shape == (2, 4, 4, 96) and grid.is_contiguous()
