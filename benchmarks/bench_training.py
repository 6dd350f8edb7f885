"""What training for a smoothed classifier costs.

python benchmarks/bench_training.py cost    time of a step over the floor of the method's own passes
python benchmarks/bench_training.py peers   time, passes and accuracy against ART's own trainers
"""

from sections import sections

main = sections(cost="training_cost", peers="training_peers")
main.help = "Benchmarks of training."

if __name__ == "__main__":
    main()
