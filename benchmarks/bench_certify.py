"""How fast certification is, and how few votes it needs.

python benchmarks/bench_certify.py speed      noisy images per second, against the best loop written by hand and peers
python benchmarks/bench_certify.py samples    votes per image of each plan, and the certified accuracy it reports
"""

from sections import sections

main = sections(speed="certify_speed", samples="certify_samples")
main.help = "Benchmarks of certification."

if __name__ == "__main__":
    main()
