"""Scores of a model on a split: top-1 and top-5, COCO mAP, VOC AP, validation losses."""
