"""Model ports: one short file a model family, and the porting interface."""
