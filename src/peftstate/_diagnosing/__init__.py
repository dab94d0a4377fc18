"""Why a model predicts otherwise than the saved one: each cause alone, measured."""
