"""`patch` on ViTs of several kinds: hidden states on request, masks only where there are any."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from encoders import PatchConfig
from encoders.positions import resize_positions
from encoders.types import Images
from vlp.data.transforms import pad_images

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL = {"model": "vit_tiny_patch16_224", "image_size": 32, "width": 32, "heads": 4}


@pytest.mark.parametrize("settings", [{}, {"class_token": False}])
def test_layers_end_in_the_states(settings):
    encoder = PatchConfig(**SMALL, depth=2, **settings).build().eval()
    found = encoder(Images(PIXELS), layers=True)
    assert [layer.shape for layer in found.layers] == [found.states.shape] * 3
    assert torch.equal(found.states, encoder(Images(PIXELS)).states)
    assert torch.equal(encoder.vit.blocks[0](found.layers[0]), found.layers[1])
    assert torch.equal(encoder.finish(found.layers[-1]), found.states)


def test_threads_that_serve_one_model_get_their_own_layers():
    """Layers come by hooks, which are the module's: without a lock each of two threads would get those of both."""
    encoder = PatchConfig(**SMALL, depth=2).build().eval()
    images = [Images(PIXELS[:1]), Images(PIXELS[1:])]
    wanted = [encoder(one, layers=True).layers for one in images]
    encoder.vit.blocks[0].register_forward_pre_hook(lambda *given: time.sleep(0.02))  # so that the two would meet
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: encoder(one, layers=True).layers, images))
    for own, right in zip(found, wanted, strict=True):
        assert len(own) == 3 and all(map(torch.equal, own, right))


def test_the_only_layer_of_bare_embeddings_is_themselves():
    encoder = PatchConfig(**SMALL, depth=0).build().eval()
    found = encoder(Images(PIXELS), layers=True)
    assert len(found.layers) == 1 and torch.equal(found.layers[0], found.states)
    assert torch.equal(found.states, encoder(Images(PIXELS)).states)


def test_epsilon():
    encoder = PatchConfig(**SMALL, depth=2, eps=1e-3).build()
    assert {part.eps for part in encoder.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-3}


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_of_each_image_own_grid(class_token):
    """Images of unlike sizes in one batch get what each gets alone; the table is for 32 x 32 pixels in patches of 4."""
    encoder = PatchConfig(
        **SMALL | {"image_size": 64}, patch_size=4, depth=0, position_size=32, class_token=class_token
    ).build()
    sizes = [(16, 24), (8, 40), (4, 4), (32, 32)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    found = encoder(pad_images(images, 4))
    for row, image in enumerate(images):
        alone = encoder(Images(image[None])).states[0]
        torch.testing.assert_close(found.states[row][found.keep[row]], alone, rtol=1e-5, atol=1e-6)
        table = encoder.vit.pos_embed[0]
        wanted = resize_positions(
            table, (image.shape[1] // 4, image.shape[2] // 4), int(class_token), "bilinear_corners"
        )
        pixels = (image[None].float() / 255 - encoder.mean) / encoder.std
        patches = encoder.vit.patch_embed(pixels)[0] + wanted[int(class_token) :]
        torch.testing.assert_close(alone[int(class_token) :], patches, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"stem": (8, 16), "patch_size": 1}, {"patch_drop": 0.5}])
def test_positions_of_each_image_need_all_patches(settings):
    with pytest.raises(ValueError, match="position_size 32 needs all patches of the image itself"):
        PatchConfig(**SMALL, depth=2, position_size=32, **settings).build()


@pytest.mark.parametrize(
    "settings", [{}, {"class_token": False, "pool": "map"}, {"model": "vit_base_patch16_clip_224"}]
)
def test_images_of_unlike_sizes_are_what_each_is_alone(settings):
    """Through all blocks, with antialiased positions (NaFlex)."""
    sizes = {"patch_size": 4, "depth": 2, "position_size": 32, "position_resize": "bilinear_antialias"}
    encoder = PatchConfig(**SMALL | sizes | settings).build().eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(16, 24), (8, 40), (4, 4), (32, 32)]]
    found = encoder(pad_images(images, 4), layers=True)
    assert len(found.layers) == 3
    for row, image in enumerate(images):
        alone = encoder(Images(image[None]))
        torch.testing.assert_close(found.states[row][found.keep[row]], alone.states[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pooled[row], alone.pooled[0], rtol=1e-4, atol=1e-5)
    plain = PatchConfig(**SMALL | sizes | settings | {"position_size": None}).build().eval()
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain(Images(images[3][None])).states, encoder(Images(images[3][None])).states)


def test_a_vit_that_takes_no_mask():
    encoder = PatchConfig(model="beit_base_patch16_224", image_size=32, width=32, depth=1, heads=4).build().eval()
    assert encoder(Images(PIXELS)).states.shape == (2, 5, 32)


@pytest.mark.parametrize("settings", [{}, {"class_token": False}])
def test_patch_dropout_in_training_alone(settings):
    """FLIP: half of the 64 patches, others each time, and the class token always; all when it only reads."""
    encoder = PatchConfig(**SMALL, patch_size=4, depth=2, patch_drop=0.5, **settings).build()
    prefix, seen = encoder.num_prefix, []
    encoder.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = encoder.vit.patch_embed(encoder._normalised(PIXELS)) + encoder.vit.pos_embed[:, prefix:]
    for _ in range(2):
        found = encoder.train()(Images(PIXELS))
        assert found.states.shape == (2, 32 + prefix, 32) and found.pooled.shape == (2, 32)
    chosen = [torch.cdist(one[:, prefix:], before).argmin(2).sort(1).values for one in seen]
    assert all(len(set(row.tolist())) == 32 for rows in chosen for row in rows)
    assert not torch.equal(chosen[0][0], chosen[0][1]) and not torch.equal(chosen[0], chosen[1])
    assert encoder.eval()(Images(PIXELS)).states.shape == (2, 64 + prefix, 32)


def test_patch_dropout_does_not_mix_with_hidden_patches():
    encoder = PatchConfig(**SMALL, patch_size=4, depth=2, patch_drop=0.5, mask_token=True).build()
    with pytest.raises(ValueError, match="patch_drop"):
        encoder(Images(PIXELS, masked=torch.zeros(2, 64, dtype=torch.bool)))


def test_hybrid_reads_the_cells_of_a_cnn():
    encoder = PatchConfig(**SMALL, hybrid="resnet18", patch_size=1, depth=0, class_token=False).build().eval()
    assert encoder.grid == (2, 2) and encoder.num_tokens == 4 and encoder.patch_size == 16
    cells = encoder.vit.patch_embed.backbone(encoder._normalised(PIXELS))[-1]
    assert cells.shape == (2, 256, 2, 2)  # a sixteenth of the side
    wanted = torch.einsum("bchw,dc->bhwd", cells, encoder.vit.patch_embed.proj.weight[:, :, 0, 0]).flatten(1, 2)
    wanted = wanted + encoder.vit.patch_embed.proj.bias + encoder.vit.pos_embed
    torch.testing.assert_close(encoder(Images(PIXELS)).states, wanted, rtol=1e-4, atol=1e-4)
    assert not any("layer4" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("settings", [{"hybrid": "no_such_cnn"}, {"hybrid": "resnet18", "stem": (8,)}])
def test_a_hybrid_that_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match=r"model\.vision\.hybrid"):
        PatchConfig(**SMALL, **settings).build()
