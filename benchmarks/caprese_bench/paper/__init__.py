"""What the paper reports, and the published shapes of models: figures to set measured ones beside."""
