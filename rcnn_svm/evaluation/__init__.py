"""Average precision by the rules of Pascal VOC and COCO, its uncertainty, and the field's exchange files."""
