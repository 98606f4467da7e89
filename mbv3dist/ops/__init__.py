"""Operations on boxes: coordinates and coder (boxes.py), detector post-process (nms.py)."""
