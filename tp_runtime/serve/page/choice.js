// Which patches are chosen, at which strength, and what their forms allow. This file knows nothing of the document.

const ONLY_WEIGHTS = "with weights only"; // the words of tp_runtime/patch/capabilities.py
const NO_STRENGTH = "0 or 1";

/** The patches of a server and the user's choice among them. Names that the server no longer has are dropped. */
export class Choice {
  constructor() {
    this.cards = new Map(); // the entry of /v1/models of each patch, by its name in requests
    this.strengths = new Map(); // of the chosen patches
    this.base = null; // the entry of the model itself
  }

  /** Take over what the server lists, and return the names that were chosen and are gone. */
  load(listed) {
    this.base = listed.find((card) => !card.patch) ?? null;
    this.cards = new Map(listed.filter((card) => card.patch).map((card) => [card.id, card.patch]));
    const gone = [...this.strengths.keys()].filter((name) => !this.cards.has(name));
    for (const name of gone) this.strengths.delete(name);
    // A file may have come back with another form.
    for (const [name, strength] of [...this.strengths]) {
      if (this.onlyWhole(name) && strength !== 0 && strength !== 1) this.strengths.set(name, 1);
      if (this.refusal(name) !== null) this.strengths.delete(name);
    }
    return gone;
  }

  /** Whether a patch is there or not, and nothing in between. */
  onlyWhole(name) {
    return this.cards.get(name).capabilities.strength === NO_STRENGTH;
  }

  /** Return why a patch cannot be chosen beside the others, or null. */
  refusal(name) {
    const entries = (other) => this.cards.get(other).capabilities.sums === ONLY_WEIGHTS;
    if (!entries(name)) return null;
    const other = [...this.strengths.keys()].find((chosen) => chosen !== name && entries(chosen));
    return other === undefined ? null : `adds up ${ONLY_WEIGHTS}, and ${other} has entries too`;
  }

  /** Return the chosen patches that act: those with a strength. */
  get active() {
    return [...this.strengths].filter(([, strength]) => strength !== 0);
  }

  /** Return the field `patch` of a request; null for no patch. */
  get field() {
    return this.active.length ? Object.fromEntries(this.active) : null;
  }

  /** Return the name of the choice, such as policy or pirate@0.5+french. */
  get label() {
    return this.active.map(([name, strength]) => (strength === 1 ? name : `${name}@${strength}`)).join("+");
  }

  /** Return why a request under the choice can have no system message, or null if it can. */
  get noSystem() {
    return this.systemWords("none");
  }

  /** Return why a request under the choice needs a system message, or null if it does not. */
  get needsSystem() {
    return this.systemWords("needed");
  }

  /** Return which patch's capability begins with a word, and the capability; null if that of none does. */
  systemWords(word) {
    const found = this.active.find(([name]) => this.cards.get(name).capabilities.system.startsWith(word));
    return found ? `${found[0]}: ${this.cards.get(found[0]).capabilities.system}` : null;
  }

  /** Return the stop strings of the choice: those of its patches. */
  get stop() {
    return [...new Set(this.active.flatMap(([name]) => this.cards.get(name).stop))];
  }

  /** Return the tokens that a session holds beyond those that the usage counts: entries less the ids they replace. */
  get extraTokens() {
    return this.active
      .map(([name]) => this.cards.get(name).entries)
      .reduce((sum, entries) => sum + (entries ? entries.mean - entries.replaces : 0), 0);
  }

  /** Return the bytes of the files of the choice. */
  get fileBytes() {
    return this.active.reduce((sum, [name]) => sum + this.cards.get(name).bytes, 0);
  }
}
