"""All methods, and their registration with transformers' Auto classes."""

if __name__ != "hf_ssl.modeling":
    raise ImportError(
        "import hf_ssl.modeling; the folder modeling/ in the checkout's root is a link for readers"
    )

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: folder name and command-line name.
        prefix: start of the class names.
        family: what the method does, in two words.
        paper: arXiv number of the main paper.
        summary: the idea in one line.
        title: of the paper, for its citation.
        authors: of the paper, as BibTeX writes them.
    """

    name: str
    prefix: str
    family: str
    paper: str
    summary: str
    title: str = ""
    authors: str = ""

    def _get(self, suffix: str) -> Any:
        return getattr(import_module(f"hf_ssl.modeling.{self.name}"), self.prefix + suffix)

    @property
    def config_class(self) -> Any:
        """`<M>Config`."""
        return self._get("Config")

    @property
    def model_class(self) -> Any:
        """`<M>Model`, the encoder."""
        return self._get("Model")

    @property
    def pretraining_class(self) -> Any:
        """`<M>ForPreTraining`."""
        return self._get("ForPreTraining")

    @property
    def processor_class(self) -> Any:
        """`<M>ImageProcessor`."""
        return self._get("ImageProcessor")

    @property
    def text_processor_class(self) -> Any:
        """`<M>Processor` of images with texts; None for methods of images alone."""
        return getattr(import_module(f"hf_ssl.modeling.{self.name}"), f"{self.prefix}Processor", None)


METHODS = {
    method.name: method
    for method in (
        Method(
            "simclr",
            "SimCLR",
            "contrastive",
            "2002.05709",
            "two views attract, all other images of the batch repel",
            "A Simple Framework for Contrastive Learning of Visual Representations",
            "Ting Chen and Simon Kornblith and Mohammad Norouzi and Geoffrey Hinton",
        ),
        Method(
            "moco",
            "MoCo",
            "contrastive",
            "2003.04297",
            "a query finds its key among a queue of older keys",
            "Improved Baselines with Momentum Contrastive Learning",
            "Xinlei Chen and Haoqi Fan and Ross Girshick and Kaiming He",
        ),
        Method(
            "mocov3",
            "MoCoV3",
            "contrastive",
            "2104.02057",
            "predictions find the other view's key among the batch; made for ViTs",
            "An Empirical Study of Training Self-Supervised Vision Transformers",
            "Xinlei Chen and Saining Xie and Kaiming He",
        ),
        Method(
            "mae",
            "MAE",
            "masked",
            "2111.06377",
            "encode a quarter of the patches, reconstruct the rest",
            "Masked Autoencoders Are Scalable Vision Learners",
            "Kaiming He and Xinlei Chen and Saining Xie and Yanghao Li and Piotr Dollár and Ross Girshick",
        ),
        Method(
            "beit_tokenizer",
            "BEiTTokenizer",
            "visual tokens",
            "2208.06366",
            "a few thousand codes for patches, from which a frozen encoder's features come back",
            "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers",
            "Zhiliang Peng and Li Dong and Hangbo Bao and Qixiang Ye and Furu Wei",
        ),
        Method(
            "beit",
            "BEiT",
            "masked",
            "2106.08254",
            "predict the visual tokens of hidden blocks of patches",
            "BEiT: BERT Pre-Training of Image Transformers",
            "Hangbo Bao and Li Dong and Songhao Piao and Furu Wei",
        ),
        Method(
            "dino",
            "DINO",
            "self-distillation",
            "2104.14294",
            "a small crop predicts a momentum teacher's choice among prototypes for a large one",
            "Emerging Properties in Self-Supervised Vision Transformers",
            "Mathilde Caron and Hugo Touvron and Ishan Misra and Hervé Jégou and Julien Mairal and "
            "Piotr Bojanowski and Armand Joulin",
        ),
        Method(
            "ibot",
            "iBOT",
            "self-distillation",
            "2111.07832",
            "as DINO, and hidden patches predict the teacher's choice for them",
            "iBOT: Image BERT Pre-Training with Online Tokenizer",
            "Jinghao Zhou and Chen Wei and Huiyu Wang and Wei Shen and Cihang Xie and Alan Yuille and "
            "Tao Kong",
        ),
        Method(
            "dinov2",
            "DINOv2",
            "self-distillation",
            "2304.07193",
            "as iBOT, with features spread over the sphere; anchored patches as an option",
            "DINOv2: Learning Robust Visual Features without Supervision",
            "Maxime Oquab and Timothée Darcet and Théo Moutakanni and Huy Vo and Marc Szafraniec and "
            "Vasil Khalidov and Pierre Fernandez and Daniel Haziza and Francisco Massa and "
            "Alaaeldin El-Nouby and Mahmoud Assran and Nicolas Ballas and Wojciech Galuba and "
            "Russell Howes and Po-Yao Huang and Shang-Wen Li and Ishan Misra and Michael Rabbat and "
            "Vasu Sharma and Gabriel Synnaeve and Hu Xu and Hervé Jegou and Julien Mairal and "
            "Patrick Labatut and Armand Joulin and Piotr Bojanowski",
        ),
        Method(
            "ijepa",
            "IJEPA",
            "joint-embedding prediction",
            "2301.08243",
            "from one block of an image, predict a momentum teacher's tokens of other blocks",
            "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
            "Mahmoud Assran and Quentin Duval and Ishan Misra and Piotr Bojanowski and Pascal Vincent and "
            "Michael Rabbat and Yann LeCun and Nicolas Ballas",
        ),
        Method(
            "vjepa",
            "VJEPA",
            "joint-embedding prediction",
            "2404.08471",
            "predict the momentum teacher's tokens of tubes hidden in a clip",
            "Revisiting Feature Prediction for Learning Visual Representations from Video",
            "Adrien Bardes and Quentin Garrido and Jean Ponce and Xinlei Chen and Michael Rabbat and "
            "Yann LeCun and Mahmoud Assran and Nicolas Ballas",
        ),
        Method(
            "clip",
            "SSLCLIP",
            "images with texts",
            "2103.00020",
            "an image and its caption find each other among the batch",
            "Learning Transferable Visual Models From Natural Language Supervision",
            "Alec Radford and Jong Wook Kim and Chris Hallacy and Aditya Ramesh and Gabriel Goh and "
            "Sandhini Agarwal and Girish Sastry and Amanda Askell and Pamela Mishkin and Jack Clark and "
            "Gretchen Krueger and Ilya Sutskever",
        ),
        Method(
            "siglip",
            "SigLIP",
            "images with texts",
            "2303.15343",
            "each image with each caption is a yes or no of its own",
            "Sigmoid Loss for Language Image Pre-Training",
            "Xiaohua Zhai and Basil Mustafa and Alexander Kolesnikov and Lucas Beyer",
        ),
    )
}


def method_of(config: Any) -> Method:
    """The method that a config (an object, or the content of its file) belongs to.

    Raises:
        ValueError: none of ours.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    for method in METHODS.values():
        if method.config_class.model_type == model_type:
            return method
    raise ValueError(f"model_type '{model_type}' is no method of hf_ssl")


def register() -> None:
    """Make transformers' Auto classes for configs, models and image processors know every method."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForPreTraining,
        AutoProcessor,
    )

    for method in METHODS.values():
        config = method.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, method.model_class, exist_ok=True)
        AutoModelForPreTraining.register(config, method.pretraining_class, exist_ok=True)
        AutoImageProcessor.register(
            config, image_processor_classes={"torchvision": method.processor_class}, exist_ok=True
        )
        if method.text_processor_class is not None:
            AutoProcessor.register(config, method.text_processor_class, exist_ok=True)


register()
