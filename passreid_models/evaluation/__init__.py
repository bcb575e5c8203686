"""A model on a dataset.

    evaluate        the whole: descriptors, ranking, metrics, report
    extract         descriptors of many files, shared by processes; feature_cache: kept
    report          the result as a table and as JSON; pictures: as pictures
    gallery_page    a map of a gallery as an HTML page
    attention       patches that CLS and each PART attend to

The metrics themselves (mAP, CMC, ROC) are in ``passreid_models.retrieval``.
"""

from passreid_models.evaluation.attention import AttentionMaps, attention_maps, draw_parts
from passreid_models.evaluation.evaluate import evaluate_dataset, evaluate_model
from passreid_models.evaluation.gallery_page import write_gallery_page
from passreid_models.evaluation.pictures import draw_evaluation
from passreid_models.evaluation.report import Evaluation

__all__ = [
    "AttentionMaps",
    "Evaluation",
    "attention_maps",
    "draw_evaluation",
    "draw_parts",
    "evaluate_dataset",
    "evaluate_model",
    "write_gallery_page",
]
