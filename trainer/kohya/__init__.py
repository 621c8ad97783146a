"""Commands and configurations of kohya's sd-scripts, as commands of this trainer."""
