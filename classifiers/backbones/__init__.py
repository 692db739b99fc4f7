"""Backbones: networks that give features and, by one linear layer, logits."""

from classifiers.backbones.alexnet import AlexNetCIFAR
from classifiers.backbones.backbone import Backbone, features_of, last_layer
from classifiers.backbones.cnn import BadNetsCNN, SmallCNN
from classifiers.backbones.inception import InceptionV3
from classifiers.backbones.lite import EfficientNetLite
from classifiers.backbones.mlp import MLP
from classifiers.backbones.named import Timm, TorchVision
from classifiers.backbones.resnet import PreActResNet18, ResNet9, ResNet18
from classifiers.backbones.smoothing import Smoothing
from classifiers.backbones.vgg import VGG11

__all__ = [
    "MLP",
    "VGG11",
    "AlexNetCIFAR",
    "Backbone",
    "BadNetsCNN",
    "EfficientNetLite",
    "InceptionV3",
    "PreActResNet18",
    "ResNet9",
    "ResNet18",
    "SmallCNN",
    "Smoothing",
    "Timm",
    "TorchVision",
    "features_of",
    "last_layer",
]
