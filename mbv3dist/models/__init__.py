"""Classifiers, detectors, their loss, their weights and the directories they are stored in."""
