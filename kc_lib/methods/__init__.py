"""Methods: functions ``(model, task, ...) -> result`` that say where a piece of knowledge is."""
