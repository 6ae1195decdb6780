"""Models of learn2learn and torchvision, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model_zoo import WAYS, Problem, images, problem
from torch import nn

from metamom.interop.imports import import_learn2learn, import_torchvision
from metamom.nets.models import use_batch_statistics


def of_learn2learn(name: str, side: int, channels: int, **options: Any) -> Callable[[], Problem]:
    def make() -> nn.Module:
        models = import_learn2learn().vision.models
        return use_batch_statistics(getattr(models, name)(**options)).eval()

    return lambda: problem(make, images(channels, side, side), WAYS)


def resnet12_block() -> nn.Module:
    import_learn2learn()
    from learn2learn.vision.models.resnet12 import BasicBlock

    shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = BasicBlock(3, 4, stride=2, downsample=shortcut)
    return use_batch_statistics(nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WAYS)))


def wide_resnet() -> nn.Module:
    import_learn2learn()
    from learn2learn.vision.models.wrn28 import WideResNet

    return use_batch_statistics(nn.Sequential(WideResNet(10, 1, dropout_rate=0.0), nn.Flatten(), nn.Linear(64, WAYS)))


LEARN2LEARN: dict[str, Callable[[], Problem]] = {
    "OmniglotCNN": of_learn2learn("OmniglotCNN", 28, 1, output_size=WAYS, hidden_size=4, layers=4),
    "OmniglotFC": of_learn2learn("OmniglotFC", 28, 1, input_size=784, output_size=WAYS, sizes=[8, 4]),
    "CNN4": of_learn2learn("CNN4", 32, 3, output_size=WAYS, hidden_size=4, layers=4, embedding_size=16),
    "a block of ResNet12": lambda: problem(resnet12_block, images(3, 8, 8), WAYS),
    "a WideResNet of ten layers": lambda: problem(wide_resnet, images(3, 84, 84), WAYS, noise=0.01),
}
LARGE_LEARN2LEARN = ("a WideResNet of ten layers",)


def of_torchvision(make: Callable[[Any], nn.Module], side: int = 32) -> Callable[[], Problem]:
    return lambda: problem(
        lambda: use_batch_statistics(make(import_torchvision().models)).eval(), images(3, side, side), WAYS, noise=0.01
    )


def named(name: str, side: int = 32, **options: Any) -> Callable[[], Problem]:
    return of_torchvision(lambda models: getattr(models, name)(num_classes=WAYS, **options), side)


TORCHVISION: dict[str, Callable[[], Problem]] = {
    "a ResNet of four blocks": of_torchvision(
        lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=WAYS, width_per_group=64)
    ),
    "a vision transformer of two layers": of_torchvision(
        lambda models: models.VisionTransformer(
            image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=WAYS
        )
    ),
    "a Swin transformer": of_torchvision(
        lambda models: models.SwinTransformer(
            patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=WAYS,
            stochastic_depth_prob=0.0,
        )
    ),
    "a VGG of two layers": of_torchvision(
        lambda models: nn.Sequential(
            models.vgg.make_layers([4, "M", 8, "M"], batch_norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, WAYS),
        ),
        16,
    ),
    "a DenseNet of two blocks": of_torchvision(
        lambda models: models.DenseNet(
            growth_rate=4, block_config=(2, 2), num_init_features=4, bn_size=2, num_classes=WAYS
        ),
        16,
    ),
    "DeepLab's pyramid": of_torchvision(
        lambda models: nn.Sequential(
            models.segmentation.deeplabv3.ASPP(3, [2, 4], 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WAYS)
        ),
        8,
    ),
    "a MobileNetV2 of three blocks": of_torchvision(
        lambda models: models.MobileNetV2(
            num_classes=WAYS, width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2]], round_nearest=4
        )
    ),
    "a ResNeXt of four blocks": of_torchvision(
        lambda models: models.ResNet(
            models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=WAYS, groups=2, width_per_group=4
        )
    ),
    "a MaxViT of two blocks": of_torchvision(
        lambda models: models.MaxVit(
            input_size=(32, 32), stem_channels=4, partition_size=2, block_channels=[4, 8], block_layers=[1, 1],
            head_dim=2, stochastic_depth_prob=0.0, num_classes=WAYS,
        )
    ),
    "a Swin transformer, version 2": of_torchvision(
        lambda models: models.SwinTransformer(
            patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=WAYS,
            stochastic_depth_prob=0.0, block=models.swin_transformer.SwinTransformerBlockV2,
        )
    ),
    "squeezenet1_1": named("squeezenet1_1"),
    "resnet18": named("resnet18"),
    "mobilenet_v3_small": named("mobilenet_v3_small"),
    "shufflenet_v2_x0_5": named("shufflenet_v2_x0_5", 64),
    "mnasnet0_5": named("mnasnet0_5", 64),
    "efficientnet_b0": named("efficientnet_b0", 64),
    "regnet_y_400mf": named("regnet_y_400mf", 64),
    "densenet121": named("densenet121"),
    "googlenet": named("googlenet", aux_logits=False, init_weights=False),
    "convnext_tiny": named("convnext_tiny"),
}  # fmt: skip
# without second derivatives in PyTorch (of hardsigmoid)
FIRST_ORDER_TORCHVISION = ("mobilenet_v3_small",)
SMALL_TORCHVISION = (
    "a vision transformer of two layers", "a Swin transformer", "a VGG of two layers", "a DenseNet of two blocks",
    "DeepLab's pyramid",
)  # fmt: skip
