"""Tools around training: the quickstart, the data set it draws, and checks of the machine."""
