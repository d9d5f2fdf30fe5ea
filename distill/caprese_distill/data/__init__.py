"""From rows as people have them to token ids."""
