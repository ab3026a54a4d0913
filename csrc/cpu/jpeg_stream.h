// The first fault of a Huffman-coded JPEG file: its markers and every coded symbol are read, no pixel is computed.
//
// Decoders fill in what damage leaves undecodable and go on; this reader stops at what no encoder writes. Sections,
// tables and figures are those of ITU-T T.81.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace vf {

struct JpegFault {
  std::string phrase;
};

template <class... Parts>
[[noreturn]] void jpeg_fault(const Parts&... parts) {
  std::ostringstream phrase;
  (phrase << ... << parts);
  throw JpegFault{phrase.str()};
}

// What is left of a marker segment, which began at a byte of the file.
struct JpegSegment {
  const uint8_t *next, *end;
  size_t began;

  int byte() {
    if (next == end) jpeg_fault("the segment at byte ", began, " is too short");
    return *next++;
  }
  int word() {
    const int high = byte();
    return high << 8 | byte();
  }
};

// Codes of up to 16 bits in ascending order (Annex C).
class HuffmanTable {
 public:
  bool is_defined() const { return is_defined_; }

  // Section B.2.4.2. Accepts the code of ones only as well, which the section excludes and some encoders use.
  void define(JpegSegment& segment) {
    std::array<int, 17> counts{};
    for (int length = 1; length <= 16; ++length) counts[length] = segment.byte();
    fast_.fill(0);
    int code = 0, index = 0;
    for (int length = 1; length <= 16; ++length, code <<= 1) {
      const int count = counts[length];
      if (code + count > 1 << length || index + count > 256) jpeg_fault("a Huffman table has more codes than fit");
      offset_[length] = index - code;
      for (int i = 0; i < count; ++i) add(code++, length, index++, segment.byte());
      end_[length] = static_cast<uint32_t>(code) << (16 - length);
    }
    is_defined_ = true;
  }

  // The code at the top of `window`, as length << 8 | symbol; 0 if there is none.
  uint32_t find(uint64_t window) const {
    const auto next = static_cast<uint32_t>(window >> 48);
    if (const uint32_t entry = fast_[next >> (16 - kFastBits)]) return entry;
    for (int length = kFastBits + 1; length <= 16; ++length) {
      if (next < end_[length]) return length << 8 | symbols_[offset_[length] + (next >> (16 - length))];
    }
    return 0;
  }

 private:
  static constexpr int kFastBits = 9;

  void add(int code, int length, int index, int symbol) {
    symbols_[index] = static_cast<uint8_t>(symbol);
    const int spare = kFastBits - length;
    if (spare >= 0) std::fill_n(&fast_[code << spare], 1 << spare, static_cast<uint16_t>(length << 8 | symbol));
  }

  bool is_defined_ = false;
  std::array<uint16_t, 1 << kFastBits> fast_{};  // by the next bits; 0: a longer code, or none
  std::array<uint32_t, 17> end_{};               // by length: the first 16 bits that are above its codes
  std::array<int, 17> offset_{};                 // by length: from a code to the index of its symbol
  std::array<uint8_t, 256> symbols_{};
};

class JpegStream {
 public:
  JpegStream(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  // Throws JpegFault. What follows the EOI marker is not read: telephones append data.
  void check() {
    if (size_ < 2 || data_[0] != 0xFF || data_[1] != 0xD8) jpeg_fault("the file does not begin with an SOI marker");
    at_ = 2;
    for (int marker = next_marker(); marker != 0xD9; marker = next_marker()) {
      const bool is_alone = marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7);  // TEM; RSTn after the last interval
      if (!is_alone) read(marker, take_segment());
    }
    if (components_.empty()) jpeg_fault("there is no frame");
    for (const Component& component : components_) {
      if (component.sent[0] < 0) jpeg_fault("component ", component.id, " has no scan");
    }
  }

 private:
  struct Component {
    int id, width, height, table;   // sampling factors; number of the quantisation table
    int64_t blocks;                 // in a scan of this component alone (section A.2.2)
    std::array<int8_t, 64> sent;    // the lowest bit that scans have sent of each coefficient; -1: none
    std::vector<uint64_t> nonzero;  // coefficients of each block, for scans that refine them
  };
  struct Part {  // a component's part in the current scan
    Component* component;
    const HuffmanTable *dc_codes, *ac_codes;
    int blocks;      // in an MCU
    int largest_dc;  // magnitude
    int dc;          // of the block before
  };

  int next_marker() {
    for (; at_ + 1 < size_; ++at_) {
      const uint8_t after = data_[at_ + 1];
      if (data_[at_] != 0xFF) {
        if (has_scan_) jpeg_fault("byte ", at_, " is no marker, though one is due");
      } else if (after != 0x00 && after != 0xFF) {  // any number of FF may precede a marker (B.1.1.2)
        at_ += 2;
        return after;
      }
    }
    jpeg_fault("there is no EOI marker");
  }

  JpegSegment take_segment() {
    const size_t began = at_;
    const size_t length = began + 2 <= size_ ? data_[began] << 8 | data_[began + 1] : 0;
    if (length < 2 || length > size_ - began) jpeg_fault("the segment at byte ", began, " does not end in the file");
    at_ += length;
    return {data_ + began + 2, data_ + at_, began};
  }

  void read(int marker, JpegSegment segment) {
    if (marker == 0xC4) return read_huffman_tables(segment);
    if (marker == 0xDB) return read_quantisation_tables(segment);
    if (marker == 0xDD) return void(interval_ = segment.word());
    if (marker == 0xDA) return read_scan(segment);
    if (marker >= 0xC0 && marker <= 0xC2) return read_frame(marker, segment);
    const bool is_passed_over = (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE || marker == 0xDC;
    if (is_passed_over) return;  // APPn, COM, DNL
    if (marker < 0xC0 || marker == 0xD8) jpeg_fault("there is a marker of no meaning before byte ", segment.began);
    jpeg_fault("not checked: lossless, hierarchical, arithmetic coding or an extension of JPEG");
  }

  void read_huffman_tables(JpegSegment& segment) {
    while (segment.next != segment.end) {
      const int to = segment.byte();
      if ((to & 0xEC) != 0) jpeg_fault("there is no Huffman table ", to);
      huffman_[to >> 4][to & 3].define(segment);
    }
    has_huffman_ = true;
  }

  void read_quantisation_tables(JpegSegment& segment) {
    while (segment.next != segment.end) {
      const int to = segment.byte();
      if ((to & 0xEC) != 0) jpeg_fault("there is no quantisation table ", to);
      for (int k = 0; k < 64; ++k) {
        const int step = to >> 4 != 0 ? segment.word() : segment.byte();
        if (k == 0) dc_steps_[to & 3] = std::max(1, step);
      }
    }
  }

  // Sections B.2.2 and A.1.1.
  void read_frame(int marker, JpegSegment& segment) {
    if (!components_.empty()) jpeg_fault("there is a second frame");
    is_progressive_ = marker == 0xC2;
    precision_ = segment.byte();
    if (precision_ != 8 && (precision_ != 12 || marker == 0xC0)) jpeg_fault("the samples have ", precision_, " bits");
    const int64_t height = segment.word(), width = segment.word();
    components_.resize(segment.byte());
    if (height == 0) jpeg_fault("not checked: the height follows the first scan");
    if (components_.size() > 4) jpeg_fault("not checked: more than four components");
    if (width == 0 || components_.empty()) jpeg_fault("there are no pixels");
    int most_x = 1, most_y = 1;
    for (Component& component : components_) {
      component.id = segment.byte();
      const int factors = segment.byte();
      component.width = factors >> 4, component.height = factors & 15, component.table = segment.byte();
      const auto is_factor = [](int factor) { return factor >= 1 && factor <= 4; };
      if (!is_factor(component.width) || !is_factor(component.height) || component.table > 3) {
        jpeg_fault("component ", component.id, " has impossible parameters");
      }
      most_x = std::max(most_x, component.width), most_y = std::max(most_y, component.height);
      component.sent.fill(-1);
    }
    mcus_ = ceil_div(width, 8 * most_x) * ceil_div(height, 8 * most_y);
    uint64_t blocks = 0;
    for (Component& component : components_) {
      component.blocks = ceil_div(ceil_div(width * component.width, most_x), 8) *
                         ceil_div(ceil_div(height * component.height, most_y), 8);
      blocks += component.blocks;
    }
    if (blocks > uint64_t{200'000'000}) jpeg_fault("not checked: too large");
    // Each block has a DC code of one bit or more. This bounds the memory for `nonzero` by 64 times the file's size.
    if (blocks > 8 * size_) jpeg_fault("the file is too short for its pixels");
  }

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Sections B.2.3 and, for progressive frames, G.1.1.1.
  void read_scan(JpegSegment& segment) {
    if (components_.empty()) jpeg_fault("there is a scan before the frame");
    if (!has_huffman_) jpeg_fault("not checked: no Huffman tables, as in frames of Motion JPEG");
    has_scan_ = true;
    parts_.clear();
    for (int left = segment.byte(); left > 0; --left) {
      const int id = segment.byte();
      add_part(id, segment.byte());
    }
    first_ = segment.byte(), last_ = segment.byte();
    const int bits = segment.byte();
    before_ = bits >> 4, shift_ = bits & 15;
    if (!is_progressive_) first_ = before_ = shift_ = 0, last_ = 63;  // some encoders leave these bytes undefined
    check_progression();
    decode_scan();
  }

  void add_part(int id, int tables) {
    for (Component& component : components_) {
      const auto is_it = [&](const Part& part) { return part.component == &component; };
      if (component.id != id || std::any_of(parts_.begin(), parts_.end(), is_it)) continue;  // ids may repeat
      const int blocks = component.width * component.height;
      // Samples of 8 bits have DC values up to 1024 (A.3.3), and rounding adds to them: also that of coarser steps from
      // which a file was quantised anew, hence a sixteenth.
      const int largest_dc = (17 << precision_) / 4 / dc_steps_[component.table] + 1;
      const HuffmanTable *dc_codes = &huffman_[0][tables >> 4 & 3], *ac_codes = &huffman_[1][tables & 3];
      return parts_.push_back({&component, dc_codes, ac_codes, blocks, largest_dc, 0});
    }
    jpeg_fault("a scan has component ", id, ", which the frame does not have");
  }

  void check_progression() {
    const bool is_band = first_ == 0 ? last_ == 0 || !is_progressive_ : parts_.size() == 1 && first_ <= last_;
    if (parts_.empty() || !is_band || last_ > 63 || shift_ > 13 || (before_ != 0 && before_ != shift_ + 1)) {
      jpeg_fault("a scan has impossible parameters");
    }
    for (const Part& part : parts_) {
      Component& component = *part.component;
      if (first_ > 0 && component.sent[0] < 0) jpeg_fault("a scan of AC coefficients precedes that of DC");
      for (int k = first_; k <= last_; ++k) {
        if (component.sent[k] != (before_ == 0 ? -1 : before_)) jpeg_fault("a scan does not continue those before");
        component.sent[k] = static_cast<int8_t>(shift_);
      }
      const bool has_dc_codes = first_ == 0 && before_ == 0, has_ac_codes = last_ > 0;
      if ((has_dc_codes && !part.dc_codes->is_defined()) || (has_ac_codes && !part.ac_codes->is_defined())) {
        jpeg_fault("a scan has a Huffman table that is not defined");
      }
      if (is_progressive_ && has_ac_codes) component.nonzero.resize(component.blocks);
    }
  }

  void decode_scan() {
    if (parts_.size() == 1) parts_[0].blocks = 1;
    int64_t left = parts_.size() == 1 ? parts_[0].component->blocks : mcus_;
    block_ = 0;
    for (int due = 0;; due = (due + 1) & 7) {
      const int64_t mcus = interval_ > 0 ? std::min<int64_t>(interval_, left) : left;
      take_stream();
      decode_mcus(mcus);
      left -= mcus;
      if (left == 0) return;
      const int number = next_marker() - 0xD0;
      if (number < 0 || number > 7) jpeg_fault("the stream ends where restart marker ", due, " is due");
      if (number != due) jpeg_fault("restart marker ", number, " where ", due, " is due");
    }
  }

  // Copies the entropy-coded bytes up to the next marker, without the zero after each FF (B.1.1.5).
  void take_stream() {
    begin_ = at_, bit_ = 0;
    stream_.clear();
    while (at_ < size_) {
      const void* found = std::memchr(data_ + at_, 0xFF, size_ - at_);
      const size_t until = found != nullptr ? static_cast<const uint8_t*>(found) - data_ : size_;
      stream_.insert(stream_.end(), data_ + at_, data_ + until);
      at_ = until;
      if (at_ + 1 >= size_ || data_[at_ + 1] != 0) break;
      stream_.push_back(0xFF);
      at_ += 2;
    }
    end_ = 8 * stream_.size();
    stream_.resize(stream_.size() + kMostPerBlock);  // so that the end is looked for only after each block
  }

  void decode_mcus(int64_t mcus) {
    left_ = 0;
    for (Part& part : parts_) left_ += mcus * part.blocks, part.dc = 0;
    while (left_ > 0) {
      for (Part& part : parts_) {
        for (int i = 0; i < part.blocks; ++i, ++block_, --left_) {
          decode_block(part);
          if (bit_ > end_) stop(bit_);
        }
      }
    }
    if (skipped_ > 0) stop(bit_ - 1, "a run of ", skipped_, " empty blocks past the last one");
    // The bits that fill the last byte should be ones (F.1.2.3), but encoders differ, and some webcams add a few bytes.
    const size_t spare = (end_ - bit_) / 8;
    if (spare > kMostSpare) jpeg_fault(spare, " bytes are left over after the last block");
  }

  void decode_block(Part& part) {
    if (first_ == 0) before_ == 0 ? decode_dc(part) : void(++bit_);
    if (last_ > 0) before_ == 0 ? decode_ac(part) : refine_ac(part);
  }

  // Section F.2.2.1.
  void decode_dc(Part& part) {
    const uint64_t bits = window(bit_);
    const uint32_t code = find(*part.dc_codes, bits, bit_);
    const int size = code & 255, length = code >> 8;
    if (size > precision_ + 3) stop(bit_, "a DC difference of ", size, " bits");  // Table F.1
    if (size > 0) part.dc += extend(bits << length, size);
    if (std::abs(part.dc) > (part.largest_dc >> shift_) + (shift_ > 0)) stop(bit_, "a DC value out of range");
    bit_ += length + size;
  }

  // Sections F.2.2.2 and G.1.2.2.
  void decode_ac(Part& part) {
    if (skipped_ > 0) return void(--skipped_);
    uint64_t at = bit_, nonzero = 0;
    for (int k = std::max(1, first_); k <= last_; ++k) {
      const uint32_t code = find(*part.ac_codes, window(at), at);
      const int size = code & 15, run = code >> 4 & 15;
      if (size == 0 && run < 15) {
        if (run > 0 && !is_progressive_) stop(at, "a symbol of no meaning");
        at += code >> 8;
        skipped_ = end_of_bands(run, at) - 1;
        break;
      }
      k += run;
      if (k + (size == 0) > last_) stop(at, "coefficient ", k + (size == 0), " of ", last_);
      if (size + shift_ > precision_ + 2) stop(at, "a coefficient of ", size, " bits");  // Table F.2
      nonzero |= static_cast<uint64_t>(size > 0) << k;
      at += (code >> 8) + size;
    }
    bit_ = at;
    if (is_progressive_) part.component->nonzero[block_] |= nonzero;
  }

  // Section G.1.2.3: a code, a new coefficient's sign, then a bit for each known coefficient that the run passes.
  void refine_ac(Part& part) {
    uint64_t& nonzero = part.component->nonzero[block_];
    int k = first_;
    for (; skipped_ == 0 && k <= last_; ++k) {
      const uint64_t at = bit_;
      const uint32_t code = find(*part.ac_codes, window(at), at);
      const int size = code & 15;
      int run = code >> 4 & 15;
      bit_ += code >> 8;
      if (size == 0 && run < 15) {
        skipped_ = end_of_bands(run, bit_);
        break;
      }
      if (size > 1) stop(at, "a new coefficient of ", size, " bits in a scan that refines");
      bit_ += size;
      for (; k <= last_; ++k) {
        const bool is_known = (nonzero >> k & 1) != 0;
        if (!is_known && run-- == 0) break;
        bit_ += is_known;
      }
      if (k + (size == 0) > last_) stop(at, "coefficient ", k + (size == 0), " of ", last_);
      nonzero |= static_cast<uint64_t>(size) << k;
    }
    if (skipped_ == 0) return;
    for (; k <= last_; ++k) bit_ += nonzero >> k & 1;
    --skipped_;
  }

  // How many blocks' bands end with this symbol (G.1.2.2); the number's lower bits are at `bit`.
  int end_of_bands(int run, uint64_t& bit) const {
    const int lower = run > 0 ? static_cast<int>(window(bit) >> (64 - run)) : 0;
    bit += run;
    return 1 << run | lower;
  }

  // The next 57 bits or more, from the top.
  uint64_t window(uint64_t bit) const {
    uint64_t bytes;
    std::memcpy(&bytes, &stream_[bit >> 3], sizeof bytes);
    return __builtin_bswap64(bytes) << (bit & 7);
  }

  uint32_t find(const HuffmanTable& table, uint64_t bits, uint64_t bit) const {
    const uint32_t code = table.find(bits);
    if (code == 0) stop(bit, "a code that is not in its Huffman table");
    return code;
  }

  // The value whose `size` bits are at the top of `bits` (Figure F.12).
  static int extend(uint64_t bits, int size) {
    const int value = static_cast<int>(bits >> (64 - size));
    return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
  }

  // The fault at a bit of the stream; past its end, that it ends.
  template <class... Parts>
  [[noreturn]] void stop(uint64_t bit, const Parts&... what) const {
    if (bit >= end_) jpeg_fault("the stream ends ", left_, " blocks early");
    const auto until = static_cast<int64_t>(bit >> 3);
    const auto stuffed = std::count(stream_.begin(), stream_.begin() + until, 0xFF);
    jpeg_fault("there is ", what..., " at byte ", begin_ + until + stuffed);
  }

  static constexpr size_t kMostSpare = 4;       // bytes after the last block
  static constexpr size_t kMostPerBlock = 512;  // bytes: 64 symbols of at most 16 + 15 bits, 63 further bits, a window

  const uint8_t* data_;
  size_t size_, at_ = 0;

  bool is_progressive_ = false, has_huffman_ = false, has_scan_ = false;
  int precision_ = 8, interval_ = 0;
  int64_t mcus_ = 0;
  std::vector<Component> components_;
  std::array<std::array<HuffmanTable, 4>, 2> huffman_;  // DC, AC
  std::array<int, 4> dc_steps_{1, 1, 1, 1};             // of quantisation

  // The current scan.
  std::vector<Part> parts_;
  int first_ = 0, last_ = 63, before_ = 0, shift_ = 0;  // Ss, Se, Ah and Al in T.81
  int64_t block_ = 0, left_ = 0;                        // in a scan of one component; of the restart interval
  std::vector<uint8_t> stream_;                         // of the interval
  size_t begin_ = 0, end_ = 0, bit_ = 0;                // byte in the file; bits in the stream
  int skipped_ = 0;                                     // blocks to come whose band has ended (EOBRUN)
};

// A phrase that says the first fault; "not checked: ..." for codings other than Huffman's; "" for a sound file.
inline std::string jpeg_stream_fault(const uint8_t* data, size_t size) {
  try {
    JpegStream(data, size).check();
  } catch (const JpegFault& fault) {
    return fault.phrase;
  }
  return "";
}

}  // namespace vf
