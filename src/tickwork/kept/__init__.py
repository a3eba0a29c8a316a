"""The journal of a service in process: training models that outlive the process they are trained in."""
