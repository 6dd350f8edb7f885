"""How strong attacks on smoothed classifiers are, what they cost, and whether certificates hold.

python benchmarks/bench_attacks.py strength   what attacks leave at equal numbers of passes; violations of certificates
python benchmarks/bench_attacks.py cost       time over the floor of an attack's own passes, and memory
"""

from sections import sections

main = sections(strength="attack_strength", cost="attack_cost")
main.help = "Benchmarks of attacks."

if __name__ == "__main__":
    main()
