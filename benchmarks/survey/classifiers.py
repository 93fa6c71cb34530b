"""The image classifiers of timm and pytorchcv: most families published since 2012."""

from __future__ import annotations

from functools import partial
from typing import Any

from survey.model import SurveyModel, pytorchcv_model, timm_model


def timm_models() -> list[SurveyModel]:
    cnn = {
        "resnet26d": 64, "resnest14d": 64, "seresnet50": 64, "skresnet18": 64, "res2net50_14w_8s": 64,
        "ecaresnet26t": 64, "resnetv2_50": 64, "gernet_s": 64, "regnety_002": 64, "regnetz_b16": 64,
        "nf_resnet26": 64, "dm_nfnet_f0": 64, "tf_efficientnetv2_b0": 64, "efficientnet_lite0": 64,
        "mixnet_s": 64, "mobilenetv3_small_100": 64, "mobilenetv4_conv_small": 64, "mobileone_s0": 64,
        "repvgg_a0": 64, "ghostnet_100": 64, "ghostnetv2_100": 64, "hrnet_w18_small": 64, "dla34": 64, "dpn68": 64,
        "inception_v4": 96, "inception_resnet_v2": 96, "xception41": 64, "cspresnet50": 64, "cspdarknet53": 64,
        "ese_vovnet19b_dw": 64, "tresnet_m": 64, "convnext_atto": 64, "convnextv2_atto": 64,
        "convmixer_768_32": 56, "rdnet_tiny": 64, "inception_next_atto": 64, "mambaout_femto": 64, "hgnet_tiny": 64,
        "hgnetv2_b0": 64, "starnet_s1": 64, "repghostnet_100": 64, "fbnetv3_b": 64, "tinynet_e": 64, "lcnet_050": 64,
        "selecsls42b": 64, "legacy_seresnext26_32x4d": 64, "nasnetalarge": 96, "pnasnet5large": 96,
        "bat_resnext26ts": 256, "gcresnet33ts": 64, "densenetblur121d": 64,
    }  # fmt: skip
    tokens_models: dict[str, tuple[str, int, dict[str, Any]]] = {
        "vit_tiny_patch16_224": ("transformer", 64, {"img_size": 64}),
        "deit_tiny_distilled_patch16_224": ("transformer", 64, {"img_size": 64}),
        "deit3_small_patch16_224": ("transformer", 64, {"img_size": 64}),
        "beit_base_patch16_224": ("transformer", 64, {"img_size": 64, "depth": 3}),
        "eva02_tiny_patch14_224": ("transformer", 56, {"img_size": 56}),
        "cait_xxs24_224": ("transformer", 64, {"img_size": 64}),
        "xcit_nano_12_p16_224": ("transformer", 64, {}),
        "swin_tiny_patch4_window7_224": ("transformer", 64, {"img_size": 64}),
        "swinv2_tiny_window8_256": ("transformer", 64, {"img_size": 64}),
        "pvt_v2_b0": ("transformer", 64, {}),
        "poolformer_s12": ("transformer", 64, {}),
        "caformer_s18": ("hybrid", 64, {}),
        "mixer_s16_224": ("transformer", 64, {"img_size": 64}),
        "gmlp_ti16_224": ("transformer", 64, {"img_size": 64}),
        "resmlp_12_224": ("transformer", 64, {"img_size": 64}),
        "levit_128s": ("hybrid", 224, {}),
        "coat_lite_tiny": ("hybrid", 64, {"img_size": 64}),
        "coatnet_nano_rw_224": ("hybrid", 64, {"img_size": 64}),
        "maxvit_pico_rw_256": ("hybrid", 64, {"img_size": 64}),
        "edgenext_xx_small": ("hybrid", 64, {}),
        "efficientformer_l1": ("hybrid", 224, {}),
        "efficientformerv2_s0": ("hybrid", 224, {}),
        "fastvit_t8": ("hybrid", 64, {}),
        "focalnet_tiny_srf": ("hybrid", 64, {}),
        "mvitv2_tiny": ("transformer", 64, {"img_size": 64}),
        "nest_tiny": ("transformer", 64, {"img_size": 64}),
        "pit_ti_224": ("transformer", 224, {}),
        "twins_svt_small": ("transformer", 64, {"img_size": 64}),
        "visformer_tiny": ("hybrid", 64, {"img_size": 64}),
        "volo_d1_224": ("transformer", 64, {"img_size": 64}),
        "davit_tiny": ("transformer", 64, {}),
        "hiera_tiny_224": ("transformer", 64, {"img_size": 64}),
        "tiny_vit_5m_224": ("hybrid", 224, {}),
        "repvit_m0_9": ("hybrid", 64, {}),
        "efficientvit_b0": ("hybrid", 64, {}),
        "efficientvit_m0": ("hybrid", 224, {}),
        "mobilevit_xxs": ("hybrid", 64, {}),
        "mobilevitv2_050": ("hybrid", 64, {}),
        "gcvit_xxtiny": ("hybrid", 64, {"img_size": 64}),
        "crossvit_tiny_240": ("transformer", 240, {}),
        "convit_tiny": ("transformer", 224, {}),
        "tnt_s_patch16_224": ("transformer", 224, {"depth": 3}),
        "sequencer2d_s": ("hybrid", 224, {"layers": (1, 1, 1, 1)}),
        "vitamin_small_224": ("hybrid", 64, {"img_size": 64}),
        "nextvit_small": ("hybrid", 64, {}),
        "shvit_s1": ("hybrid", 64, {}),
        "halonet26t": ("hybrid", 256, {}),
        "botnet26t_256": ("hybrid", 256, {}),
        "lambda_resnet26t": ("hybrid", 64, {}),
    }
    models = [SurveyModel("timm", name, "cnn", partial(timm_model, name, size)) for name, size in cnn.items()]
    for name, (kind, size, options) in tokens_models.items():
        models.append(SurveyModel("timm", name, kind, partial(timm_model, name, size, **options)))
    return models


def pytorchcv_models() -> list[SurveyModel]:
    names = [
        "preresnet18", "pyramidnet110_a48_cifar10", "diracnet18v2", "igcv3_w1", "menet108_8x1_g3",
        "shufflenet_g3_w1", "sqnxt23_w1", "bam_resnet18", "cbam_resnet18", "airnet50_1x64d_r2",
        "fishnet99", "condensenet74_c4_g4", "xdensenet121_2", "peleenet", "darknet53", "proxylessnas_gpu", "fbnet_cb",
        "spnasnet", "sharesnet18", "ror3_56_cifar10", "shakeshakeresnet20_2x16d_cifar10", "sknet50",
        "simplepose_resnet18_coco", "icnet_resnetd50b_cityscapes", "nin_cifar10", "channelnet", 
        "dicenet_wd2",
    ]  # fmt: skip
    small = {"simplepose_resnet18_coco": 64, "icnet_resnetd50b_cityscapes": 96}
    options = {"icnet_resnetd50b_cityscapes": {"in_size": (96, 96)}}
    models = []
    for name in names:
        size = 32 if "cifar" in name else small.get(name, 224)  # most end in a 7x7 pooling
        build = partial(pytorchcv_model, name, size, **options.get(name, {}))
        models.append(SurveyModel("pytorchcv", name, "cnn", build))
    return models
