"""The paper's figures, its tasks, and the published dimensions of models, to compare measured figures with."""
