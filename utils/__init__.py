"""Settings, data, the training step, evaluation, the folder of a run. Imports `models/`, never the other way round."""
