"""From folders of labelled pictures to shuffled tar shards, and the checks of what was written."""
