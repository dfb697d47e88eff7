for f in sorted(Path("gui").glob("*.json")):
    rc,o,e = lcp("train","--config",f,"--pretrained_model_name_or_path","base","--train_data_dir","img","--output_dir","out","--output_name","x","--dry_run",show=False)
    print(f"[{rc}] {f.name}"); 
    t=(e if rc else o+e).strip().split("\n")
    for l in t: 
        if rc or any(w in l for w in ("learning_rate","optimizer","steps","network","read as","not used","not known","fields")): print("    ", l[:330])
